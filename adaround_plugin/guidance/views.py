"""An analysis as a page and as a figure: where each width lies on a scale of losses, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaround_plugin.guidance.record import LayerAnalysis, Record
from adaround_plugin.guidance.text import head, row, summary
from adaround_plugin.report import figure, scale
from adaround_plugin.report.markup import document, escaped, paragraph, section, table
from adaround_plugin.report.scale import LogScale, is_drawn
from adaround_plugin.report.text import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Point", "drawn", "fragment", "page", "points"]

# what is drawn of each row: whose losses, how they are called, which class or colour, and where in the row
_LANES = (("nearest_loss", "nearest", "before", 14), ("learned_loss", "GPTQ", "after", 30))
_COLOURS = {"before": "tab:orange", "after": "tab:blue"}


@dataclass(frozen=True)
class Point:
    """A row of the data frame: a layer at a width; attributes as of `LayerAnalysis` and `Width`."""

    name: str
    kind: str
    weights: int
    bits: int
    bytes: int
    nearest_loss: float
    learned_loss: float


def points(record: Record) -> list[Point]:
    """A row for each layer and width."""
    return [
        Point(layer.name, layer.kind, layer.weights, one.bits, one.bytes, one.nearest_loss, one.learned_loss)
        for layer in record.layers
        for one in layer.widths
    ]


def page(record: Record) -> str:
    """The whole page."""
    said = "Each number stands at the loss of that many bits; lower losses stand further left."
    rows = [row(layer) for layer in record.layers]
    asked = {
        "layers": f"{len(record.layers)}, {len(record.skipped)} not analysed",
        "samples": record.samples,
        "seconds": f"{record.seconds.get('total', 0.0):.1f}",
        "made with": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    shown = "".join(f"<dt>{name}</dt><dd>{escaped(value)}</dd>" for name, value in asked.items())
    parts = (
        f"<dl>{shown}</dl>",
        section("Loss at each width", paragraph(summary(record), "faint"), paragraph(said, "faint"), _chart(record)),
        section("In figures", table(head(record.bits), rows)),
        section("Layers that were not analysed", table(("layer", "op", "reason"), record.skipped)),
    )
    return document("Bits and losses", parts)


def fragment(record: Record) -> str:
    """The table and the sentence, for a notebook."""
    return table(head(record.bits), [row(layer) for layer in record.layers]) + paragraph(summary(record))


def _chart(record: Record) -> str:
    """Losses on a logarithmic scale, nothing where there are none."""
    losses = [getattr(width, lane[0]) for layer in record.layers for width in layer.widths for lane in _LANES]
    values = [one for one in losses if is_drawn(one)]
    if not values:
        return ""
    over = LogScale.over(values)
    key = scale.legend((kind, label) for _, label, kind, _ in _LANES)
    return f"{key}\n{scale.chart([over.axis(), *(_row(layer, over) for layer in record.layers), over.axis()])}"


def _row(layer: LayerAnalysis, over: LogScale) -> str:
    """One layer: two lanes with its widths."""
    marks = ""
    for attribute, label, kind, y in _LANES:
        for width in layer.widths:
            value = getattr(width, attribute)
            if is_drawn(value):
                said = f"{label}, {width.bits} bits: {number(value)}"
                place = f'x="{over.at(value):.2f}%" y="{y}" text-anchor="middle"'
                marks += f'<text class="{kind}" {place}>{width.bits}<title>{escaped(said)}</title></text>'
    said = "; ".join(f"{width.bits} bits {number(width.learned_loss)}" for width in layer.widths)
    return scale.row(layer.name, scale.drawing(36, said, over.lines(), marks), f"{layer.weights} weights")


def drawn(record: Record) -> Figure:
    """The same as a figure of matplotlib.

    Raises:
        MissingDependencyError: matplotlib cannot be imported.
    """
    made, axes = figure.rows_of([layer.name for layer in record.layers], "expected error of the network's output")
    for attribute, label, kind, y in _LANES:
        offset = -0.18 if y < 20 else 0.18
        places, values = [], []
        for number_of_row, layer in enumerate(record.layers):
            for width in layer.widths:
                value = getattr(width, attribute)
                places.append(number_of_row + offset)
                values.append(value if is_drawn(value) else math.nan)
                if is_drawn(value):
                    text = axes.text(value, places[-1], str(width.bits), ha="center", va="center", fontsize=9)
                    text.set_color(_COLOURS[kind])
        # text alone does not make room for itself on the axis
        axes.plot(values, places, ".", color=_COLOURS[kind], alpha=0.15, markersize=12, label=label)
    made.legend(loc="outside upper center", ncols=2)
    return made
