"""A report as tables of rich, for a terminal (`pip install 'adaround_plugin[report]'`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from adaround_plugin.report.record import Record
from adaround_plugin.report.text import BLOCK_HEAD, LAYER_HEAD, block_row, layer_row, number, summary

__all__ = ["tables"]

# what an ordinary terminal has room for; the others are in the text and on the page
_LAYER_COLUMNS = ("layer", "bits", "nearest", "learned", "held-out nearest", "held-out learned", "flipped", "note")
_BLOCK_COLUMNS = ("learned on samples", "start", "learned", "held-out start", "held-out learned", "iterations", "note")
# columns of names and sentences, which are not cut off but go on in the next line
_PROSE = {"layer", "learned on samples", "note", "reason", "recipe"}


def tables(record: Record) -> RenderableType:
    """The tables and the sentence; a warning comes last, where it is seen."""
    blocks = record.learned_on_samples
    trials = [(number(one.output_error), f"{one.recipe} {one.note}".strip()) for one in record.trials]
    parts: list[RenderableType] = [
        _table(LAYER_HEAD, _LAYER_COLUMNS, map(layer_row, record.layers)),
        _table(BLOCK_HEAD, _BLOCK_COLUMNS, map(block_row, blocks)),
        _table(("skipped", "op", "reason"), ("skipped", "op", "reason"), record.skipped),
        _table(("predicted error", "recipe"), ("predicted error", "recipe"), trials),
        Text(summary(record)),
        *(Text(f"warning: {warning}", style="bold yellow") for warning in record.warnings),
    ]
    return Group(*(part for part in parts if not isinstance(part, Table) or part.row_count))


def _table(head: Sequence[str], shown: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Some columns of rows of cells, whatever these hold: nothing in them is markup."""
    table = Table()
    for name in shown:
        prose = name in _PROSE
        table.add_column(Text(name), overflow="fold", justify="left" if prose else "right", no_wrap=False)
    places = [head.index(name) for name in shown]
    for row in rows:
        table.add_row(*(Text(row[place]) for place in places))
    return table
