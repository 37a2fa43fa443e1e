"""The documentation as a site, as tests build it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["build_site"]

ROOT = Path(__file__).resolve().parents[1]


def build_site(folder: Path) -> list[Path]:
    """Build it into a folder; a warning is an error. Its pages."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    # without the theme's advertisement for its successor
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return sorted(folder.rglob("*.html"))
