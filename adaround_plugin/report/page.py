"""A report as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator

from adaround_plugin.report.charts import Errors, error_chart, scale_chart, time_chart
from adaround_plugin.report.markup import document, escaped, paragraph, section, table
from adaround_plugin.report.record import BlockReport, LayerReport, Record
from adaround_plugin.report.text import BLOCK_HEAD, LAYER_HEAD, block_row, layer_row, number, summary

__all__ = ["fragment", "page"]


def page(record: Record) -> str:
    """The whole page."""
    parts = (
        _asked(record),
        _result(record),
        _warnings(record),
        _layers(record),
        _scales(record),
        _blocks(record),
        section("Notes", *_notes(record)),
        section("Layers that were not learned", table(("layer", "op", "reason"), record.skipped)),
        _trials(record),
        _time(record),
        _memory(record),
        _repeat(record),
    )
    return document("AdaRound report", parts)


def fragment(record: Record) -> str:
    """The table of the layers and the sentence, for a notebook."""
    return table(LAYER_HEAD, [layer_row(layer) for layer in record.layers]) + paragraph(summary(record))


def _asked(record: Record) -> str:
    """What was asked, and of how many layers."""
    kept = sum(layer.learned for layer in record.layers)
    entries = {
        "method": record.method,
        "solver": record.solver,
        "recipe": record.recipe,
        "seed": record.settings.get("seed", ""),
        "layers": f"{kept} of {len(record.layers)} learned, {len(record.skipped)} skipped",
        "made with": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    shown = (f"<dt>{name}</dt><dd>{escaped(value)}</dd>" for name, value in entries.items() if value)
    return f"<dl>{''.join(shown)}</dl>"


def _result(record: Record) -> str:
    """The error of the network's output."""
    nearest, learned = record.nearest_output_error, record.output_error
    tiles = [("rounded to nearest", number(nearest)), ("learned", number(learned))]
    if nearest is not None and learned is not None and nearest > 0:
        tiles.append(("learned over nearest", f"{learned / nearest:.1%}"))
    shown = "".join(f'<div class="tile"><span>{name}</span><b>{value}</b></div>' for name, value in tiles)
    said = (
        "Mean squared error over the variance of the float network's output, on held-out samples (on all, where none "
        "were held out). The float network has 0."
    )
    return section("At the network's output", f'<div class="tiles">{shown}</div>', paragraph(said, "faint"))


def _warnings(record: Record) -> str:
    rows = [
        (one.name, f"{one.low:.3g} … {one.high:.3g}", f"{one.least:.3g} … {one.greatest:.3g}", f"{one.share:.1%}")
        for one in record.clipped
    ]
    shown = table(("activation", "seen by its observer", "in the batches", "outside"), rows)
    return section("Warnings", *map(paragraph, record.warnings), shown)


def _layers(record: Record) -> str:
    said = (
        "Squared error of each layer's output over its variance, in the order in which the layers were decided. "
        "Errors of earlier layers are in it. Compare the numbers of one layer with each other."
    )
    chart = error_chart([Errors.of_layer(layer) for layer in record.layers], "nearest")
    rows = [layer_row(layer) for layer in record.layers]
    return section("Layers", paragraph(said, "faint") if rows else "", chart, table(LAYER_HEAD, rows))


def _scales(record: Record) -> str:
    said = "Of each layer's weights: the least, the median and the greatest of its channels or groups."
    chart = scale_chart(record.layers)
    return section("Scales", paragraph(said, "faint") if chart else "", chart)


def _blocks(record: Record) -> str:
    blocks = record.learned_on_samples
    chart = error_chart([Errors.of_block(block) for block in blocks], "start")
    return section("Learned on samples", chart, table(BLOCK_HEAD, [block_row(block) for block in blocks]))


def _notes(record: Record) -> Iterator[str]:
    """Each note, and whose it is."""
    names: dict[str, list[str]] = {}
    entries: list[LayerReport | BlockReport] = [*record.layers, *record.learned_on_samples]
    for entry in entries:
        if entry.note:
            names.setdefault(entry.note, []).append(entry.name)
    return (paragraph(note) + paragraph(", ".join(of), "faint of") for note, of in names.items())


def _trials(record: Record) -> str:
    rows = [
        (
            number(trial.output_error),
            "yes" if trial.taken else "",
            f"{trial.recipe}: {trial.note}" if trial.note else trial.recipe,
        )
        for trial in record.trials
    ]
    said = (
        "What each trial predicts for the error of the network's output. Predictions compare with one another, and "
        "only roughly with the result above."
    )
    shown = table(("predicted error", "taken", "recipe"), rows)
    return section("Recipes that were tried", paragraph(said, "faint") if rows else "", shown)


def _time(record: Record) -> str:
    chart = time_chart(record.seconds)
    total = f"{record.seconds['total']:.2f} s in total." if "total" in record.seconds else ""
    return section("Time", paragraph(total) if chart and total else "", chart)


def _memory(record: Record) -> str:
    rows = [(name, f"{used / 1e6:,.0f} MB") for name, used in record.memory.items()]
    said = (
        "process and GPUs: the most that was in use since the process began, and before learning did. What is kept of "
        "the batches: within its budget, the most in memory (kept) and in files (spilled), and all that was written."
    )
    return section("Memory", paragraph(said, "faint") if rows else "", table(("", ""), rows))


def _repeat(record: Record) -> str:
    if not record.settings:
        return ""
    arguments = [value if name == "method" else f"{name}={value}" for name, value in record.settings.items()]
    lines = "".join(f"    {argument},\n" for argument in ["prepared", "data", *arguments])
    said = (
        "The same prepared model, data and machine give the same integers. Pass inputs and backend_config as you did. "
        "Objects of your own stand here as Python writes them."
    )
    return section("To repeat it", f"<pre>adaround(\n{escaped(lines)})</pre>", paragraph(said, "faint"))
