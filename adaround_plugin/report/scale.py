"""What charts are drawn of: rows with a name in full, a logarithmic scale, an axis and a legend.

Charts are HTML with SVG that is as wide as there is room. Places are percentages of the width, so that nothing is
scaled and nothing has to be cut off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from adaround_plugin.report.markup import breakable, escaped

__all__ = ["LogScale", "chart", "drawing", "is_drawn", "legend", "row"]

# share of the width that stays free left and right, for half a dot and half a label
_MARGIN = 4.0
_MOST_TICKS, _FEW_DECADES = 7, 2


@dataclass(frozen=True)
class LogScale:
    """Powers of ten from left to right."""

    low: int
    high: int

    @classmethod
    def over(cls, values: Sequence[float]) -> LogScale:
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

    def axis(self) -> str:
        """A row with the labels."""
        marks = "".join(f'<text x="{x:.2f}%" y="12" text-anchor="middle">{label}</text>' for x, label in self.ticks())
        return row("", f'<svg height="16" aria-hidden="true">{marks}</svg>', "", "axis")

    def lines(self) -> str:
        """The lines of the labels, for the drawing of a row."""
        return "".join(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"/>' for x, _ in self.ticks())


def legend(key: Iterable[tuple[str, str]]) -> str:
    """Classes of marks, and what they stand for."""
    shown = "".join(f'<span><i class="{kind}"></i>{escaped(label)}</span>' for kind, label in key)
    return f'<p class="legend">{shown}</p>'


def drawing(height: int, said: str, *parts: str) -> str:
    """The drawing of a row, and what a reader hears of it."""
    return f'<svg height="{height}" role="img" aria-label="{escaped(said)}">{"".join(parts)}</svg>'


def chart(rows: Sequence[str]) -> str:
    """Rows below one another."""
    lines = "\n".join(rows)
    return f'<div class="chart">\n{lines}\n</div>'


def row(name: str, drawing: str, told: str, kind: str = "") -> str:
    """A name, a drawing, and what it says in figures."""
    return (
        f'<div class="row {kind}"><span class="name">{breakable(name)}</span>'
        f'{drawing}<span class="told">{escaped(told)}</span></div>'
    )


def is_drawn(value: float | None) -> TypeGuard[float]:
    """Whether a logarithmic scale has a place for it."""
    return value is not None and math.isfinite(value) and value > 0
