"""A report as text: tables of aligned columns, and a sentence. Heads and cells serve the page too."""

from __future__ import annotations

from collections.abc import Sequence

from adaround_plugin.report.record import BlockReport, LayerReport, Record

__all__ = ["BLOCK_HEAD", "LAYER_HEAD", "aligned", "block_row", "layer_row", "number", "summary", "text"]

LAYER_HEAD = (
    "layer",
    "op",
    "weight",
    "bits",
    "nearest",
    "learned",
    "held-out nearest",
    "held-out learned",
    "flipped",
    "clipped",
    "bias",
    "seconds",
    "note",
)
BLOCK_HEAD = (
    "learned on samples",
    "layers",
    "start",
    "learned",
    "held-out start",
    "held-out learned",
    "iterations",
    "seconds",
    "note",
)


def text(record: Record) -> str:
    """The whole report."""
    lines = aligned(LAYER_HEAD, [layer_row(layer) for layer in record.layers])
    if record.learned_on_samples:
        lines += aligned(BLOCK_HEAD, [block_row(block) for block in record.learned_on_samples])
    lines += [f"skipped {name} ({kind}): {reason}" for name, kind, reason in record.skipped]
    for trial in record.trials:
        lines.append(f"tried {trial.recipe}: {trial.note or f'output error {number(trial.output_error)}'}")
    lines += [f"warning: {warning}" for warning in record.warnings]
    return "\n".join([*lines, summary(record)])


def summary(record: Record) -> str:
    """What was done, what came of it, and how long it took."""
    kept = sum(layer.learned for layer in record.layers)
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in record.seconds.items())
    return (
        f"method {record.method}: {kept} of {len(record.layers)} layers learned (solver {record.solver}, "
        f"{record.recipe}); output error {number(record.output_error)}, "
        f"of nearest {number(record.nearest_output_error)}; "
        f"{f'{record.processes} processes; ' if record.processes > 1 else ''}"
        f"{f'resumed, {record.recalled} decisions recalled; ' if record.recalled else ''}{seconds}"
    )


def layer_row(layer: LayerReport) -> tuple[str, ...]:
    """The cells of one layer, under `LAYER_HEAD`."""
    return (
        layer.name,
        layer.kind,
        "x".join(map(str, layer.shape)),
        str(layer.bits),
        number(layer.nearest_error),
        number(layer.learned_error),
        number(layer.nearest_holdout),
        number(layer.learned_holdout),
        f"{layer.flipped:.1%}",
        f"{layer.clipped:.1%}",
        layer.bias,
        f"{layer.seconds:.2f}",
        layer.note,
    )


def block_row(block: BlockReport) -> tuple[str, ...]:
    """The cells of one block, under `BLOCK_HEAD`."""
    return (
        block.name,
        str(len(block.layers)),
        number(block.start_error),
        number(block.learned_error),
        number(block.start_holdout),
        number(block.learned_holdout),
        str(block.iterations),
        f"{block.seconds:.2f}",
        block.note,
    )


def number(value: float | None) -> str:
    """An error in three digits; `-` where there is none."""
    return "-" if value is None else f"{value:.3g}"


def aligned(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns."""
    rows = [head, *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
