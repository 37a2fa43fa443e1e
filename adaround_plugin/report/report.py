"""The report that a user gets: the data, with the ways to show and to keep them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torch import fx, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.files import check_path, write_whole
from adaround_plugin.report.figure import figure
from adaround_plugin.report.frame import frame
from adaround_plugin.report.page import fragment, page
from adaround_plugin.report.record import LayerReport, Record
from adaround_plugin.report.stored import read, written
from adaround_plugin.report.text import text as text_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["KEY", "Report", "get_report"]

# where a model keeps its report
KEY = "adaround_report"
_FORMAT = "adaround report"


class Report(Record):
    """What `adaround` did; attributes as in `Record`."""

    def __str__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        return fragment(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The whole report as JSON, with the name and the version of the format."""
        return written(self, _FORMAT, indent)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            InvalidOptionError: `text` is no JSON, has another format or version, or is no report.
        """
        return read(text, cls, _FORMAT)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML page with charts, which needs no network and no script; all or nothing.

        Args:
            path: of the file; one that is there is replaced.

        Raises:
            InvalidOptionError: `path` is no path, or that of a folder, or lies in a folder that does not exist.
        """
        write_whole(check_path("path", path), page(self).encode("utf-8", "xmlcharrefreplace"))

    def to_dataframe(self) -> pd.DataFrame:
        """The layers as a pandas DataFrame: a row for each, and a column for each attribute of `LayerReport`.

        Raises:
            MissingDependencyError: pandas cannot be imported.
        """
        return frame(self.layers, LayerReport, ("nearest_holdout", "learned_holdout"))

    def plot(self) -> Figure:
        """The errors of the layers, nearest beside learned, as a figure of matplotlib that pyplot does not know.

        Raises:
            MissingDependencyError: matplotlib cannot be imported.
        """
        return figure(self)


def get_report(model: nn.Module) -> Report:
    """The report that `adaround` left in the model it returned.

    Raises:
        InvalidModelError: the model has none.
    """
    report = (model.meta if isinstance(model, fx.GraphModule) else getattr(model, "__dict__", {})).get(KEY)
    if not isinstance(report, Report):
        raise InvalidModelError("model", "carries no AdaRound report", "Pass the model that adaround(...) returned.")
    return report
