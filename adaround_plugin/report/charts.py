"""Charts of the page: a row for each layer or phase, with its name in full, and SVG that is as wide as there is room.

Places are percentages of the width, so that nothing is scaled and nothing has to be cut off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from adaround_plugin.report.markup import breakable, escaped
from adaround_plugin.report.record import BlockReport, LayerReport
from adaround_plugin.report.text import number

__all__ = ["Errors", "error_chart", "is_drawn", "time_chart"]

# share of the width that stays free left and right, for half a dot and half a label
_MARGIN = 4.0
_MOST_TICKS, _FEW_DECADES = 7, 2


@dataclass(frozen=True)
class Errors:
    """A row of the chart of errors.

    Attributes:
        name: of the layer or block, with what is to be known of it.
        before, after: with nearest, or at the start; and learned. Each `(learning, held-out)` samples.
    """

    name: str
    before: tuple[float | None, float | None]
    after: tuple[float | None, float | None]

    @classmethod
    def of_layer(cls, layer: LayerReport) -> Errors:
        """Those of a layer."""
        return cls(
            layer.name if layer.learned else f"{layer.name} (nearest kept)",
            (layer.nearest_error, layer.nearest_holdout),
            (layer.learned_error, layer.learned_holdout),
        )

    @classmethod
    def of_block(cls, block: BlockReport) -> Errors:
        """Those of a block."""
        return cls(block.name, (block.start_error, block.start_holdout), (block.learned_error, block.learned_holdout))


@dataclass(frozen=True)
class _Scale:
    """Powers of ten from left to right."""

    low: int
    high: int

    @classmethod
    def over(cls, values: Sequence[float]) -> _Scale:
        """The decades around positive values; one decade at least."""
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return cls(low, max(high, low + 1))

    def at(self, value: float) -> float:
        """The place of a value, in percent of the width."""
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return _MARGIN + (100 - 2 * _MARGIN) * share

    def ticks(self) -> Iterable[tuple[float, str]]:
        """Places and labels: powers of ten, of few decades their double and fivefold too."""
        decades = self.high - self.low
        factors = (1, 2, 5) if decades <= _FEW_DECADES else (1,)
        powers = range(self.low, self.high + 1, math.ceil(decades / _MOST_TICKS))
        values = [factor * 10.0**power for power in powers for factor in factors]
        return [(self.at(value), f"{value:g}") for value in values if value <= 10.0**self.high]


def error_chart(rows: Sequence[Errors], before: str) -> str:
    """Errors on a logarithmic scale, those before above those learned; values that are not positive are only written.

    Args:
        rows: from the top down.
        before: what the errors before are called.

    Returns:
        HTML; nothing where no row has a number.
    """
    values = [value for row in rows for value in (*row.before, *row.after) if is_drawn(value)]
    if not values:
        return ""
    scale = _Scale.over(values)
    marks = "".join(f'<text x="{x:.2f}%" y="12" text-anchor="middle">{label}</text>' for x, label in scale.ticks())
    lines = "".join(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"/>' for x, _ in scale.ticks())
    held = any(is_drawn(value) for row in rows for value in (row.before[1], row.after[1]))
    key = [("before", before), ("after", "learned"), *([("held", "held-out samples")] if held else [])]
    legend = "".join(f'<span><i class="{kind}"></i>{escaped(label)}</span>' for kind, label in key)
    axis = _row("", f'<svg height="16" aria-hidden="true">{marks}</svg>', "", "axis")
    drawn = (_error_row(row, scale, lines, before) for row in rows)
    return f'<p class="legend">{legend}</p>\n{_chart([axis, *drawn, axis])}'


def _error_row(row: Errors, scale: _Scale, grid: str, before: str) -> str:
    """One layer or block: two lanes."""
    told = f"{number(row.before[0])} → {number(row.after[0])}"
    lanes = (("before", before, row.before, 12), ("after", "learned", row.after, 24))
    drawn = "".join(_lane(kind, label, pair, y, scale) for kind, label, pair, y in lanes)
    said = f"{before} {number(row.before[0])}, learned {number(row.after[0])}"
    return _row(row.name, f'<svg height="36" role="img" aria-label="{escaped(said)}">{grid}{drawn}</svg>', told)


def _lane(kind: str, label: str, pair: tuple[float | None, float | None], y: int, scale: _Scale) -> str:
    """The error on the learning samples as a dot, that on held-out samples as a ring, and a line between."""
    places = [(scale.at(value), value, held) for value, held in zip(pair, ("", "held"), strict=True) if is_drawn(value)]
    line = ""
    if len(places) == 2:
        line = f'<line class="{kind}" x1="{places[0][0]:.2f}%" x2="{places[1][0]:.2f}%" y1="{y}" y2="{y}"/>'
    return line + "".join(
        f'<circle class="{kind} {held}" cx="{x:.2f}%" cy="{y}" r="4.5">'
        f"<title>{escaped(label)}{', held-out' if held else ''}: {number(value)}</title></circle>"
        for x, value, held in places
    )


def time_chart(seconds: Mapping[str, float]) -> str:
    """Seconds by phase as bars, and the rest of `total`; nothing where there are none."""
    phases = {phase: value for phase, value in seconds.items() if phase != "total"}
    total = seconds.get("total", sum(phases.values()))
    if (rest := total - sum(phases.values())) > 0:
        phases["other"] = rest
    most = max(phases.values(), default=0.0)
    rows = []
    for phase, value in phases.items():
        width = 100 * value / most if most > 0 else 0.0
        bar = f'<svg height="16" aria-hidden="true"><rect class="bar" width="{width:.2f}%" height="14" y="1"/></svg>'
        rows.append(_row(phase, bar, f"{value:.2f} s"))
    return _chart(rows) if rows else ""


def _chart(rows: Sequence[str]) -> str:
    """Rows below one another."""
    lines = "\n".join(rows)
    return f'<div class="chart">\n{lines}\n</div>'


def _row(name: str, drawing: str, told: str, kind: str = "") -> str:
    """A name, a drawing, and what it says in figures."""
    return (
        f'<div class="row {kind}"><span class="name">{breakable(name)}</span>'
        f'{drawing}<span class="told">{escaped(told)}</span></div>'
    )


def is_drawn(value: float | None) -> TypeGuard[float]:
    """Whether a logarithmic scale has a place for it."""
    return value is not None and math.isfinite(value) and value > 0
