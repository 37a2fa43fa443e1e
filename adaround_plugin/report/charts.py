"""Charts of the page: a row for each layer or phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaround_plugin.report.markup import escaped
from adaround_plugin.report.record import BlockReport, LayerReport
from adaround_plugin.report.scale import LogScale, chart, drawing, is_drawn, legend, row
from adaround_plugin.report.text import number

__all__ = ["Errors", "error_chart", "scale_chart", "time_chart"]


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
    scale = LogScale.over(values)
    held = any(is_drawn(value) for row in rows for value in (row.before[1], row.after[1]))
    key = [("before", before), ("after", "learned"), *([("held", "held-out samples")] if held else [])]
    drawn = (_error_row(row, scale, before) for row in rows)
    return f"{legend(key)}\n{chart([scale.axis(), *drawn, scale.axis()])}"


def _error_row(errors: Errors, scale: LogScale, before: str) -> str:
    """One layer or block: two lanes."""
    told = f"{number(errors.before[0])} → {number(errors.after[0])}"
    lanes = (("before", before, errors.before, 12), ("after", "learned", errors.after, 24))
    drawn = "".join(_lane(kind, label, pair, y, scale) for kind, label, pair, y in lanes)
    said = f"{before} {number(errors.before[0])}, learned {number(errors.after[0])}"
    return row(errors.name, drawing(36, said, scale.lines(), drawn), told)


def _lane(kind: str, label: str, pair: tuple[float | None, float | None], y: int, scale: LogScale) -> str:
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


def scale_chart(layers: Sequence[LayerReport]) -> str:
    """The scales of each layer's weights on a logarithmic scale: a line over all of them, a dot at the median.

    Returns:
        HTML; nothing where no layer tells.
    """
    told = [(layer.name, (layer.least_scale, layer.median_scale, layer.greatest_scale)) for layer in layers]
    values = [value for _, scales in told for value in scales if is_drawn(value)]
    if not values:
        return ""
    scale = LogScale.over(values)
    return chart([scale.axis(), *(_scale_row(name, scales, scale) for name, scales in told), scale.axis()])


def _scale_row(name: str, scales: tuple[float | None, ...], scale: LogScale) -> str:
    places = [f"{scale.at(value):.2f}%" for value in scales if is_drawn(value)]
    drawn = ""
    if len(places) == len(scales):
        least, median, greatest = places
        drawn = f'<line class="after" x1="{least}" x2="{greatest}" y1="9" y2="9"/>'
        drawn += f'<circle class="after" cx="{median}" cy="9" r="3.5"/>'
    least, median, greatest = map(number, scales)
    figures = median if least == greatest else f"{least} … {greatest}"
    return row(name, drawing(18, f"scales from {least} to {greatest}, median {median}", scale.lines(), drawn), figures)


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
        rows.append(row(phase, bar, f"{value:.2f} s"))
    return chart(rows) if rows else ""
