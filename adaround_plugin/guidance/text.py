"""An analysis and an allocation as text. Heads and cells serve the page too."""

from __future__ import annotations

from collections.abc import Mapping

from adaround_plugin.guidance.record import LayerAnalysis, Record
from adaround_plugin.report.text import aligned, number

__all__ = ["allocation_text", "analysis_text", "head", "row", "summary"]


def head(bits: tuple[int, ...]) -> tuple[str, ...]:
    """The heads of the table."""
    return ("layer", "op", "weight", *(f"{one} bits" for one in bits))


def row(layer: LayerAnalysis) -> tuple[str, ...]:
    """The cells of a layer: at each width the loss of nearest, and of the cheap solver."""
    shape = "x".join(map(str, layer.shape))
    losses = (f"{number(width.nearest_loss)} -> {number(width.learned_loss)}" for width in layer.widths)
    return layer.name, layer.kind, shape, *losses


def summary(record: Record) -> str:
    """What the numbers are."""
    return (
        f"{len(record.layers)} layers by {record.samples} samples: expected squared error of the network's output over "
        "its variance with one layer quantized alone, rounded to nearest -> by GPTQ with the scale searched and rows "
        "coupled"
    )


def analysis_text(record: Record) -> str:
    """The whole analysis."""
    lines = aligned(head(record.bits), [row(layer) for layer in record.layers])
    lines += [f"not analysed {name} ({kind}): {reason}" for name, kind, reason in record.skipped]
    return "\n".join([*lines, summary(record)])


def allocation_text(record: Record, bits: Mapping[str, int], rounding: str, told: str) -> str:
    """Bits of each layer, what they take and what they cost.

    Args:
        record: what they are chosen from.
        bits: by name of the layer.
        rounding: `"nearest"` or `"learned"`.
        told: the last line.
    """
    rows = []
    for layer in record.layers:
        width = layer.at(bits[layer.name])
        loss = width.nearest_loss if rounding == "nearest" else width.learned_loss
        rows.append((layer.name, str(layer.weights), str(width.bits), str(width.bytes), number(loss)))
    return "\n".join([*aligned(("layer", "weights", "bits", "bytes", "loss"), rows), told])
