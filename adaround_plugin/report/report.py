"""The report that a user gets: the data, with the ways to show and to keep them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.report.document import Document
from adaround_plugin.report.figure import figure
from adaround_plugin.report.frame import frame
from adaround_plugin.report.page import fragment, page
from adaround_plugin.report.record import LayerReport, Record
from adaround_plugin.report.text import text as text_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.console import RenderableType

__all__ = ["KEY", "Report", "get_report", "set_report"]

# where a model keeps its report
KEY = "adaround_report"


class Report(Record, Document):
    """What `adaround` did; attributes as in `Record`."""

    _FORMAT = "adaround report"

    def __str__(self) -> str:
        return text_of(self)

    def __rich__(self) -> RenderableType:
        from adaround_plugin.report.terminal import tables

        return tables(self)

    def _repr_html_(self) -> str:
        return fragment(self)

    def _page(self) -> str:
        return page(self)

    def to_dataframe(self) -> pd.DataFrame:
        """The layers as a pandas DataFrame: a row for each, and a column for each attribute of `LayerReport`.

        Raises:
            MissingDependencyError: pandas cannot be imported.
        """
        scales = ("least_scale", "median_scale", "greatest_scale")
        return frame(self.layers, LayerReport, ("nearest_holdout", "learned_holdout", *scales))

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
    report = _place(model).get(KEY)
    if not isinstance(report, Report):
        raise InvalidModelError("model", "carries no AdaRound report", "Pass the model that adaround(...) returned.")
    return report


def set_report(model: nn.Module, report: Report) -> None:
    """Let `get_report` read a report from a model; a copy of the model has it too."""
    _place(model)[KEY] = report


def _place(model: nn.Module) -> dict[str, Any]:
    """Where a model keeps its report: a copy of a GraphModule keeps its `meta`, and loses other attributes."""
    return model.meta if isinstance(model, fx.GraphModule) else getattr(model, "__dict__", {})
