"""What results have in common: they are kept as JSON and shown as a page."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import ClassVar, Self

from adaround_plugin.files import check_path, write_whole
from adaround_plugin.report.stored import read, written

__all__ = ["Document"]


class Document(ABC):
    """A dataclass of plain data that is kept as JSON and shown as a page."""

    # its name in the JSON
    _FORMAT: ClassVar[str]

    @abstractmethod
    def _page(self) -> str:
        """The whole page."""

    def to_json(self, indent: int | None = 2) -> str:
        """All of it as JSON, with the name and the version of the format."""
        return written(self, self._FORMAT, indent)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote.

        Raises:
            InvalidOptionError: `text` is no JSON, has another format or version, or something else in it.
        """
        return read(text, cls, cls._FORMAT)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write it as one HTML page with charts, which needs no network and no script; all or nothing.

        Args:
            path: of the file; one that is there is replaced.

        Raises:
            InvalidOptionError: `path` is no path, or that of a folder, or lies in a folder that does not exist.
        """
        write_whole(check_path("path", path), self._page().encode("utf-8", "xmlcharrefreplace"))
