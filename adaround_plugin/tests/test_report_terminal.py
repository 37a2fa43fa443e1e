"""A report in a terminal: tables of rich that say all of it, whatever the names are."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from adaround_plugin.report import BlockReport, ClippedActivation, LayerReport, RecipeTrial, Report

NAME = "[bold]encoder[/bold].[/x].layers.11.attention.output"
LAYER = LayerReport(
    NAME, "Linear", (), (4, 3), 3, 0.1, 0.01, 0.2, 0.02, True, 0.25, 0.015, "kept", 10, 1.25, "a [note]"
)
REPORT = Report("blocks", "Annealing", "errors propagated", [LAYER], [("head", "Linear", "excluded")])
FULL = replace(
    REPORT,
    blocks=[BlockReport("encoder", (NAME,), 0.5, 0.25, iterations=300)],
    trials=[RecipeTrial("errors propagated", 0.125), RecipeTrial("plain", None, "[no] derivative")],
    clipped=[ClippedActivation("x", -1.0, 1.0, -3.0, 3.0, 0.25)],
)


def printed(report: Report, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(report)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_everything_is_shown_in_full(width: int) -> None:
    text = printed(FULL, width)
    assert all(len(line) <= width for line in text.splitlines())
    # names go on in the next line
    letters = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.count("│") > 6)
    assert NAME in letters
    for told in ("0.01", "25.0%", "300", "excluded", "0.125", "method blocks", "warning:"):
        assert told in text
    assert "…" not in text
    joined = " ".join(text.replace("│", " ").split())
    assert "[no] derivative" in joined or width == 80
    assert "Calibrate with the batches" in joined


def test_tables_without_rows_are_left_out() -> None:
    text = printed(REPORT, 120)
    assert "learned on samples" not in text
    assert "predicted error" not in text
    assert printed(Report("nearest", "Nearest", "plain", [], []), 120).startswith("method nearest: 0 of 0")
