"""What the commands do; each returns the lines, or the results, that it prints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adaround_plugin.api import adaround
from adaround_plugin.cli.sources import Images, load_data, load_model
from adaround_plugin.errors import InvalidOptionError, MissingDependencyError
from adaround_plugin.files import check_file, check_path, write_whole
from adaround_plugin.guidance.allocation import BitAllocation, suggest_bits
from adaround_plugin.guidance.analysis import Analysis
from adaround_plugin.guidance.analyze import analyze
from adaround_plugin.learning.methods import get_preset
from adaround_plugin.names import matching, select
from adaround_plugin.options import check_choice
from adaround_plugin.report import Report, get_report
from adaround_plugin.report.comparison import compared
from adaround_plugin.report.text import number
from adaround_plugin.rounding.grid import check_bits

if TYPE_CHECKING:
    from adaround_plugin.cli.flow import Flow

__all__ = ["analyze_model", "compare_reports", "demo", "quantize_model", "show_report"]

# bits that are looked at unless others are named
_WIDTHS = (2, 3, 4, 6, 8)


def demo(options: argparse.Namespace) -> Iterator[str]:
    """Train a network on handwritten digits and compare nearest with learned rounding."""
    for bits in options.bits:
        check_bits(bits, "--bits")
    engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    check_choice("--backend", options.backend, engines)
    html = check_path("--html", options.html)
    try:
        # scikit-learn is an extra: only the demo's data need it
        from adaround_plugin.demo import run
    except ModuleNotFoundError as error:
        raise MissingDependencyError.of(error.name or "scikit-learn", "demo", error) from error
    yield from run(options.bits, options.backend, options.report, html)


def quantize_model(options: argparse.Namespace) -> Iterator[str]:
    """Learn the rounding of a model, and save the converted program."""
    check_bits(options.bits, "--bits")
    paths = _paths(options, "output", "html", "json")
    layers = _layer_bits(options.layer_bits)
    if options.widths is not None and not _has_budget(options):
        raise InvalidOptionError("--widths", "are those to choose from under a budget", "Pass one, or leave it out.")
    flow = _flow(options)
    if _has_budget(options):
        analysis = _analysis(options, flow)
        fixed = _fixed(layers, analysis)
        allocation = _suggested(options, analysis, fixed)
        yield f"suggested bits: {allocation.summary}"
        if analysis.skipped:
            outside = ", ".join(name for name, _, _ in analysis.skipped)
            yield f"not analyzed, and not in the budget: {outside}"
        # names that were not analyzed keep what was asked for
        layers = layers | allocation.layer_bits
    prepared = flow.prepared(options.bits, {name: {"weight_bits": bits} for name, bits in layers.items()})
    is_finetuned = options.finetune or get_preset(options.method).finetune is not None
    if flow.integer_biases and is_finetuned:
        yield "biases stay in float: finetuning moves the scales that integer ones are multiples of"
    learned = adaround(
        prepared,
        flow.batches,
        options.method,
        finetune=options.finetune or None,
        seed=options.seed,
        progress=not options.quiet,
        integer_biases=flow.integer_biases and not is_finetuned,
        checkpoint=options.checkpoint,
        memory_budget=options.memory_budget,
    )
    report = get_report(learned)
    flow.save(learned, paths["output"])
    yield from _kept(report, paths)
    kept = sum(layer.learned for layer in report.layers)
    yield (
        f"{paths['output']}: {kept} of {len(report.layers)} layers learned; error of the output "
        f"{number(report.output_error)}, of nearest {number(report.nearest_output_error)}"
    )


def analyze_model(options: argparse.Namespace) -> Iterator[str]:
    """What each layer loses at each width, and bits under a budget."""
    paths = _paths(options, "html", "json")
    analysis = _analysis(options, _flow(options))
    yield str(analysis)
    yield from _kept(analysis, paths)
    if _has_budget(options):
        yield str(_suggested(options, analysis, {}))


def show_report(options: argparse.Namespace) -> Iterator[str | Report]:
    """A report, and as a page."""
    paths = _paths(options, "html")
    report = _report(options.file)
    yield report
    yield from _kept(report, paths)


def compare_reports(options: argparse.Namespace) -> Iterator[str]:
    """Two reports side by side."""
    yield compared(_report(options.one), _report(options.other))


def _flow(options: argparse.Namespace) -> Flow:
    """The model and the data."""
    # torchao is an extra: commands that read reports do without
    from adaround_plugin.cli.flow import Flow

    images = Images(options.image_size, tuple(options.mean), tuple(options.std))
    return Flow(load_model(options.model), load_data(options.data, options.batch_size, images), options.backend)


def _analysis(options: argparse.Namespace, flow: Flow) -> Analysis:
    """Of the model with weights of the most bits: its own do not matter."""
    return analyze(
        flow.prepared(8, {}),
        flow.batches,
        bits=options.widths or _WIDTHS,
        symmetric=flow.symmetric,
        seed=options.seed,
        progress=not options.quiet,
    )


def _has_budget(options: argparse.Namespace) -> bool:
    """Whether a budget is given."""
    return any(value is not None for value in (options.average_bits, options.size, options.max_loss))


def _suggested(options: argparse.Namespace, analysis: Analysis, fixed: Mapping[str, int]) -> BitAllocation:
    """Bits within the budget, of which the parser lets one be given."""
    return suggest_bits(
        analysis,
        average_bits=options.average_bits,
        size=options.size,
        max_loss=options.max_loss,
        fixed=fixed,
    )


def _fixed(layers: Mapping[str, int], analysis: Analysis) -> dict[str, int]:
    """Of the bits that were given, those of layers that were analyzed.

    Raises:
        InvalidOptionError: an entry matches no layer, or has bits that were not analyzed.
    """
    names = [name for layer in analysis.layers for name in (layer.name, *layer.tied)]
    for pattern in layers:
        select(pattern, [*names, *(name for name, _, _ in analysis.skipped)], "--layer-bits")
    fixed = {pattern: bits for pattern, bits in layers.items() if matching(pattern, names, "--layer-bits")}
    if others := set(fixed.values()).difference(analysis.bits):
        raise InvalidOptionError("--layer-bits", f"{others.pop()} is not among --widths", "Add it there.")
    return fixed


def _layer_bits(given: Sequence[str]) -> dict[str, int]:
    """Bits by name, of texts `NAME=BITS`."""
    found = {}
    for text in given:
        name, _, bits = text.rpartition("=")
        if not name or not bits.isdecimal():
            raise InvalidOptionError("--layer-bits", f"{text!r} is not NAME=BITS", "Write head=8, for example.")
        found[name] = check_bits(int(bits), "--layer-bits")
    return found


def _paths(options: argparse.Namespace, *names: str) -> dict[str, Path]:
    """The paths to write that were given, checked before work starts."""
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return {name: check_path(f"--{name}", value) for name, value in given.items()}


def _kept(found: Report | Analysis, paths: Mapping[str, Path]) -> Iterator[str]:
    """Write a report or an analysis to where it is asked for."""
    if "html" in paths:
        found.to_html(paths["html"])
        yield f"page: {paths['html']}"
    if "json" in paths:
        write_whole(paths["json"], found.to_json().encode())
        yield f"data: {paths['json']}"


def _report(file: str) -> Report:
    """The report in a file.

    Raises:
        InvalidOptionError: there is none.
    """
    try:
        text = check_file("report", file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidOptionError("report", f"{file!r} is no text ({error})", "Pass a report's JSON.") from None
    return Report.from_json(text)
