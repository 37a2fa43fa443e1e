"""What is released: the wheel has the package and no tests, and the files that speak of a version agree."""

from __future__ import annotations

from pathlib import Path

import yaml

from adaround_plugin import __version__
from integration_tests.release import ROOT, build, check_wheel


def test_the_wheel_has_the_package_and_nothing_else(tmp_path: Path) -> None:
    wheel = build("wheel", tmp_path)
    assert wheel.name == f"adaround_plugin-{__version__}-py3-none-any.whl"
    check_wheel(wheel)


def test_the_citation_names_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    assert f"## {__version__} " in (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
