"""What the package needs of others is there: a missing name is reported with the version that lacks it."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# where names of others stand that may move without notice, and the library whose names they are
COMPAT = {"graph/compat.py": "torch", "hosts/pt2e/compat.py": "torchao", "inc/compat.py": "neural-compressor"}


def _missing(file: str) -> list[str]:
    """Names that a file imports and that are not there."""
    missing = []
    for node in ast.walk(ast.parse((ROOT / "adaround_plugin" / file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None or node.module.startswith("adaround_plugin"):
            continue
        try:
            module = importlib.import_module(node.module)
        except ImportError as error:
            missing.append(f"{node.module} ({error})")
            continue
        missing += [f"{node.module}.{one.name}" for one in node.names if not hasattr(module, one.name)]
    return missing


@pytest.mark.parametrize("file", COMPAT)
def test_private_names_of_others_are_where_they_were(file: str) -> None:
    library = COMPAT[file]
    missing = _missing(file)
    assert not missing, (
        f"{library} {importlib.metadata.version(library)} lacks what adaround_plugin/{file} needs: {missing}. "
        f"Adapt that file, or bound {library} in pyproject.toml."
    )


def test_versions_are_those_that_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    for requirement in map(Requirement, declared):
        if requirement.name == "adaround_plugin":
            continue
        installed = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), (
            f"{requirement} is declared, but {installed} is installed: run pip install -e '.[test]'"
        )


def test_python_is_bounded_as_the_page_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "explanation" / "compatibility.md").read_text(encoding="utf-8")
    bounds = {"Python": project["requires-python"]}
    bounds |= {one.name: str(one.specifier) for one in map(Requirement, project["dependencies"]) if one.name == "torch"}
    for name, bound in bounds.items():
        assert f"| {name} | {bound.removeprefix('>=')} or later |" in page, f"{name}{bound}"
