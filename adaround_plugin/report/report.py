"""The report that a user gets: the data, with the ways to show and to keep them."""

from __future__ import annotations

import json
from dataclasses import asdict

from torch import fx, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.report.record import Record
from adaround_plugin.report.text import text

__all__ = ["KEY", "Report", "get_report"]

# where a model keeps its report
KEY = "adaround_report"


class Report(Record):
    """What `adaround` did; attributes as in `Record`."""

    def __str__(self) -> str:
        return text(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The whole report as JSON."""
        return json.dumps(asdict(self), indent=indent)


def get_report(model: nn.Module) -> Report:
    """The report that `adaround` left in the model it returned.

    Raises:
        InvalidModelError: the model has none.
    """
    report = (model.meta if isinstance(model, fx.GraphModule) else getattr(model, "__dict__", {})).get(KEY)
    if not isinstance(report, Report):
        raise InvalidModelError("model", "carries no AdaRound report", "Pass the model that adaround(...) returned.")
    return report
