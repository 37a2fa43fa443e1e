"""Two reports side by side, as text."""

from __future__ import annotations

from adaround_plugin.report.record import LayerReport, Record
from adaround_plugin.report.text import aligned, number

__all__ = ["compared"]

_HEAD = ("layer", "bits", "nearest", "learned", "held-out learned", "learned, B over A")


def compared(one: Record, other: Record) -> str:
    """What was done in A and in B, layer by layer in the order of A, and at the output.

    Errors of layers compare where both were learned by the same recipe; those of the output always do, on the same
    data.
    """
    layers, others = ({layer.name: layer for layer in record.layers} for record in (one, other))
    rows = [_row(name, layers.get(name), others.get(name)) for name in dict.fromkeys([*layers, *others])]
    lines = aligned(_HEAD, rows)
    for name, record in (("A", one), ("B", other)):
        seconds = record.seconds.get("total")
        lines.append(
            f"{name}: method {record.method} (solver {record.solver}, {record.recipe}); output error "
            f"{number(record.output_error)}, of nearest {number(record.nearest_output_error)}; {number(seconds)} s"
        )
    if one.output_error and other.output_error is not None:
        lines.append(f"output error, B over A: {number(other.output_error / one.output_error)}")
    return "\n".join(lines)


def _row(name: str, one: LayerReport | None, other: LayerReport | None) -> tuple[str, ...]:
    """What both have of a layer; `-` where one does not have it."""

    def pair(first: object, second: object) -> str:
        return f"{first}" if first == second else f"{first} | {second}"

    pairs = [
        pair(*(("-" if layer is None else str(layer.bits)) for layer in (one, other))),
        *(
            pair(*(number(None if layer is None else getattr(layer, attribute)) for layer in (one, other)))
            for attribute in ("nearest_error", "learned_error", "learned_holdout")
        ),
    ]
    ratio = None
    if one is not None and other is not None and one.learned_error > 0:
        ratio = other.learned_error / one.learned_error
    return name, *pairs, number(ratio)
