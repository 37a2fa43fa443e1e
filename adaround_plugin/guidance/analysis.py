"""The analysis that a user gets: the data, with the ways to show them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from adaround_plugin.files import check_path, write_whole
from adaround_plugin.guidance.record import Record
from adaround_plugin.guidance.text import analysis_text
from adaround_plugin.guidance.views import Point, drawn, fragment, page, points
from adaround_plugin.report.frame import frame
from adaround_plugin.report.stored import read, written

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Analysis"]

_FORMAT = "adaround analysis"


class Analysis(Record):
    """What `analyze` found; attributes as in `Record`."""

    def __str__(self) -> str:
        return analysis_text(self)

    def _repr_html_(self) -> str:
        return fragment(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The whole analysis as JSON, with the name and the version of the format."""
        return written(self, _FORMAT, indent)

    @classmethod
    def from_json(cls, text: str) -> Analysis:
        """The analysis that `to_json` wrote.

        Raises:
            InvalidOptionError: `text` is no JSON, has another format or version, or is no analysis.
        """
        return read(text, cls, _FORMAT)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the analysis as one HTML page with a chart, which needs no network and no script; all or nothing.

        Args:
            path: of the file; one that is there is replaced.

        Raises:
            InvalidOptionError: `path` is no path, or that of a folder, or lies in a folder that does not exist.
        """
        write_whole(check_path("path", path), page(self).encode("utf-8", "xmlcharrefreplace"))

    def to_dataframe(self) -> pd.DataFrame:
        """A pandas DataFrame with a row for each layer and width.

        Raises:
            MissingDependencyError: pandas cannot be imported.
        """
        return frame(points(self), Point, ())

    def plot(self) -> Figure:
        """Losses of the layers at each width, as a figure of matplotlib that pyplot does not know.

        Raises:
            MissingDependencyError: matplotlib cannot be imported.
        """
        return drawn(self)
