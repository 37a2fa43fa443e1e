"""Charts as figures of matplotlib, and that of a report's errors (`pip install 'adaround_plugin[report]'`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaround_plugin.errors import MissingDependencyError
from adaround_plugin.report.charts import Errors
from adaround_plugin.report.record import Record
from adaround_plugin.report.scale import is_drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure", "rows_of"]

# inches: width of the chart and of each letter of a name, height of axis and legend and of each layer
_WIDTH, _LETTER, _FRAME, _ROW = 7.0, 0.08, 1.2, 0.32
# what is drawn of each row: which errors, how they are called, where in the row, and in which colour
_LANES = (("before", "nearest", -0.15, "tab:orange"), ("after", "learned", 0.15, "tab:blue"))


def figure(record: Record) -> Figure:
    """Errors of each layer on a logarithmic scale: dots on the learning samples, rings on held-out samples.

    Raises:
        MissingDependencyError: matplotlib cannot be imported.
    """
    rows = [Errors.of_layer(layer) for layer in record.layers]
    made, axes = rows_of([row.name for row in rows], "error of the layer's output over its variance")
    for attribute, label, offset, colour in _LANES:
        pairs = [getattr(row, attribute) for row in rows]
        places = [index + offset for index in range(len(rows))]
        learning, held = ([value if is_drawn(value) else math.nan for value in side] for side in _sides(pairs))
        axes.hlines(places, learning, held, color=colour, linewidth=1.5)
        axes.plot(learning, places, "o", color=colour, label=label)
        if any(map(is_drawn, held)):
            axes.plot(held, places, "o", color=colour, markerfacecolor="white", label=f"{label}, held-out samples")
    made.legend(loc="outside upper center", ncols=4)
    return made


def rows_of(names: Sequence[str], measured: str) -> tuple[Figure, Axes]:
    """A figure with a row for each name, from the top down, on a logarithmic scale.

    The figure belongs to the caller alone: pyplot does not know it.

    Args:
        names: in full, whatever their length.
        measured: what the scale shows.

    Raises:
        MissingDependencyError: matplotlib cannot be imported.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError.of("matplotlib", "report", error) from error
    width = _WIDTH + _LETTER * max(map(len, names), default=0)
    made = Figure(figsize=(width, _FRAME + _ROW * len(names)), layout="constrained")
    axes = made.subplots()
    axes.set_xscale("log")
    # a dollar sign in a name is no formula
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.set_xlabel(measured)
    axes.grid(axis="x", alpha=0.3)
    return made, axes


def _sides(pairs: list[tuple[float | None, float | None]]) -> tuple[list[float | None], list[float | None]]:
    """The errors on the learning samples, and those on held-out samples."""
    return [learning for learning, _ in pairs], [held for _, held in pairs]
