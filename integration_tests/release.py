"""Both distributions, built from a copy of the repository, checked, installed in a fresh environment and tried there.

python -m integration_tests.release
python -m integration_tests.release --folder elsewhere --torch torch==2.13.0
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

__all__ = ["build", "check_sdist", "check_wheel"]

ROOT = Path(__file__).resolve().parent.parent
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site")
_SMOKE = """
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
import adaround_plugin
from adaround_plugin import adaround, get_adaround_qconfig_mapping, get_report

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
batches = list(torch.randn(64, 3, 8, 8).split(16))
prepared = prepare_fx(model, get_adaround_qconfig_mapping("x86", weight_bits=4), (batches[0],))
for batch in batches:
    prepared(batch)
learned = adaround(prepared, batches, progress=False)
assert len(get_report(learned).layers) == 2
assert convert_fx(learned)(batches[0]).shape == (16, 10)
print(adaround_plugin.__version__, adaround_plugin.__file__)
"""


def build(kind: str, folder: Path, source: Path = ROOT) -> Path:
    """Build a distribution with the setuptools of this environment, from a copy, so that nothing is left behind.

    Args:
        kind: `"wheel"` or `"sdist"`.
        folder: where the file goes.
        source: of the project.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as copied:
        project = Path(copied) / "project"
        shutil.copytree(source, project, ignore=_LEFT_OUT)
        code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder.resolve())!r}))"
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the {kind} cannot be built: {done.stderr[-2000:]}")
    return folder / done.stdout.splitlines()[-1]


def check_wheel(wheel: Path) -> None:
    """Raise `AssertionError` unless a wheel has the whole package, licence, types and command, and no tests."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        information = next(name for name in names if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
        metadata = opened.read(f"{information}/METADATA").decode()
        commands = opened.read(f"{information}/entry_points.txt").decode()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "adaround_plugin").rglob("*.py")}
    expected = {name for name in sources if not name.startswith("adaround_plugin/tests/")}
    expected |= {"adaround_plugin/py.typed"}
    found = {name for name in names if not name.startswith(information)}
    assert found == expected, f"too much: {sorted(found - expected)}, missing: {sorted(expected - found)}"
    assert f"{information}/licenses/LICENSE" in names, "the wheel has no LICENSE"
    assert "License-Expression: Apache-2.0" in metadata, metadata
    assert "adaround = adaround_plugin.cli:main" in commands, commands


def check_sdist(sdist: Path) -> None:
    """Raise `AssertionError` unless a source distribution has what building, testing and citing take."""
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    expected = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "mkdocs.yml",
    }
    expected |= {"docs/index.md", "integration_tests/release.py", "adaround_plugin/tests/test_architecture.py"}
    assert expected <= names, f"missing: {sorted(expected - names)}"
    assert not [name for name in names if "__pycache__" in name], "caches are in it"


def _try(file: Path, torch: str) -> str:
    """What the installed package says of itself in a fresh environment, away from the repository."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"

        def run(*arguments: str) -> str:
            # isolated: neither the folder nor PYTHONPATH may bring the repository in
            done = subprocess.run([python, "-I", *arguments], cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(arguments)[:80]}: {done.stderr[-2000:]}")
            return done.stdout

        run("-m", "pip", "install", "--quiet", torch, str(file))
        run(str(python.with_name("adaround")), "--help")
        said = run("-W", "ignore", "-c", _SMOKE).split()
        assert Path(said[1]).is_relative_to(Path(folder).resolve()), f"{said[1]} is not the installed package"
        return said[0]


def main() -> None:
    """Build, check and try both distributions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "dist", help="where the files go")
    parser.add_argument("--torch", default="torch==2.13.0", help="what to install beside")
    options = parser.parse_args()
    for kind, check in (("wheel", check_wheel), ("sdist", check_sdist)):
        file = build(kind, options.folder)
        check(file)
        print(
            f"{file.name}: {file.stat().st_size:,} bytes; installed and tried: {_try(file, options.torch)}", flush=True
        )


if __name__ == "__main__":
    main()
