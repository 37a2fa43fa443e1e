"""Files: found before work starts, and written all or nothing."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Any

from adaround_plugin.errors import InvalidOptionError

__all__ = ["check_file", "check_folder", "check_path", "write_whole"]


def check_path(argument: str, value: Any) -> Path:
    """The path of a file.

    Raises:
        InvalidOptionError: `value` is no path, or that of a folder, or lies in a folder that does not exist.
    """
    path = _as_path(argument, value)
    if path.is_dir():
        raise InvalidOptionError(argument, f"{str(path)!r} is a folder", "Pass the path of a file.")
    if not path.parent.is_dir():
        raise InvalidOptionError(
            argument, f"the folder {str(path.parent)!r} does not exist", "Make it, or pass another path."
        )
    return path


def check_file(argument: str, value: Any) -> Path:
    """The path of a file to read.

    Raises:
        InvalidOptionError: `value` is no path, or there is no such file.
    """
    path = _as_path(argument, value)
    if not path.is_file():
        raise InvalidOptionError(argument, f"there is no file {str(path)!r}", "Check the path.")
    return path


def check_folder(argument: str, value: Any) -> Path:
    """The path of a folder that exists, or can be made.

    Raises:
        InvalidOptionError: `value` is no path, or that of a file.
    """
    path = _as_path(argument, value)
    if path.exists() and not path.is_dir():
        raise InvalidOptionError(argument, f"{str(path)!r} is a file", "Pass the path of a folder.")
    return path


def _as_path(argument: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str) or "\0" in os.fspath(value):
        raise InvalidOptionError(argument, f"{value!r} is not a path", "Pass a string or a pathlib.Path.")
    return Path(value)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file, or leave what was there: the content goes to a file beside it that then takes its name.

    The content is on the disk before the name is, so that a machine without power keeps one or the other.
    """
    # of this writer alone: processes of several machines may have one number; `is_unfinished` knows the name
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def is_unfinished(name: str) -> bool:
    """Whether `write_whole` left a file of this name, because its process was killed."""
    return re.search(r"\.\d+(\.[0-9a-f]{8})?$", name) is not None


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; Windows has no such call, and does so in its own time."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
