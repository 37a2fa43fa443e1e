"""The analysis that a user gets: the data, with the ways to show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaround_plugin.guidance.record import Record
from adaround_plugin.guidance.text import analysis_text
from adaround_plugin.guidance.views import Point, drawn, fragment, page, points
from adaround_plugin.report.document import Document
from adaround_plugin.report.frame import frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Analysis"]


class Analysis(Record, Document):
    """What `analyze` found; attributes as in `Record`."""

    _FORMAT = "adaround analysis"

    def __str__(self) -> str:
        return analysis_text(self)

    def _repr_html_(self) -> str:
        return fragment(self)

    def _page(self) -> str:
        return page(self)

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
