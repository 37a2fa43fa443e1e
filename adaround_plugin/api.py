"""`adaround(...)`: arguments checked at the door, a pass over the network, the result written back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import distributed, fx, nn
from torch.ao.quantization.backend_config import BackendConfig

from adaround_plugin._version import __version__
from adaround_plugin.digests import digest
from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.files import check_folder
from adaround_plugin.graph.memory import Memory
from adaround_plugin.hosts.base import Host, Skipped, handed_over
from adaround_plugin.hosts.open import open_host
from adaround_plugin.hosts.original import check_original
from adaround_plugin.learning.agreement import open_checkpoint
from adaround_plugin.learning.comparison import Comparison
from adaround_plugin.learning.finetuning import Finetune
from adaround_plugin.learning.methods import Method, Preset, get_preset
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.progress import Progress
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.learning.trials import choose_recipe
from adaround_plugin.names import select
from adaround_plugin.options import check_bool, check_seed
from adaround_plugin.processes import open_processes
from adaround_plugin.regions.binding import bind_batches
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.masks import mask_number
from adaround_plugin.report import KEY
from adaround_plugin.solvers import get_solver

__all__ = ["adaround"]

_VERSIONS = {"adaround_plugin": __version__, "torch": str(torch.__version__)}

Exclude = Iterable[str | type[nn.Module]]


def adaround(
    prepared: nn.Module,
    data: Iterable[Any],
    method: str | Method | Preset = "default",
    *,
    finetune: bool | Finetune | None = None,
    exclude: Exclude = (),
    inputs: Callable[[Any], Any] | None = None,
    token_mask: str | None = None,
    seed: int = 0,
    progress: bool = True,
    inplace: bool = False,
    backend_config: BackendConfig | None = None,
    float_model: nn.Module | None = None,
    integer_biases: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    memory_budget: int | Literal["auto"] = "auto",
    process_group: distributed.ProcessGroup | None = None,
) -> fx.GraphModule:
    """Learn the rounding of every quantized weight; the line between calibration and conversion.

    Layers are decided in the order of the graph, each from the float and the quantized stream of activations
    (AdaRound, arXiv 2004.10568, equation 25; see docs/explanation/method.md). The result goes into the host's own
    convert, which reproduces the learned integers exactly.

    Args:
        prepared: a calibrated model from `prepare_fx` or `prepare_pt2e`, with AdaRound's or the host's own weight
            observers.
        data: unlabelled calibration batches: a DataLoader, a list, any iterable of tensors, tuples (positional) or
            dicts (keyword arguments). A few hundred samples do. It is read once, unless `memory_budget` is exceeded.
        method: `"default"`, layer by layer under second moments; `"blocks"`, then all roundings of a block together;
            `"best"`, then the whole network; `"paper"`, the paper's own; `"nearest"`, the baseline; or a
            `LayerWise`, `BlockWise` or `Paper` with settings of one's own.
        finetune: after all weights are rounded, learn scales and biases of the whole network by the error of its
            output, and the step sizes of activations that AdaRound's observers watch: True, or a `Finetune`, which can
            let integers move too. None does what the method's name stands for.
        exclude: names (a parent's name covers its children), regular expressions on names, or module types. Excluded
            layers are rounded to nearest on their own grid.
        inputs: maps a batch to the model's inputs, such as `lambda batch: batch[0]` to drop labels.
        token_mask: name of the input that says which tokens count, such as `"attention_mask"`: `(samples, tokens)` of
            ones and zeros. The others, which pad sequences, stay out of all that is learned, judged and compared,
            wherever values have an axis of tokens.
        seed: of the columns and minibatches that are drawn. The same seed, data and machine give the same integers.
        progress: show a progress bar.
        inplace: change `prepared` itself, as a whole when all is done, instead of returning a deep copy.
        backend_config: the one given to `prepare_fx`, if any (the weight-only one is recognized).
        float_model: the model that was prepared. Its outputs on the first batch are compared with those of the prepared
            model before anything is learned, so that an error of the host's prepare or convert step is named.
        integer_biases: round biases to what integer kernels add: int32 multiples of the input's scale times the
            weight's (Jacob et al. 2018, arXiv 1712.05877, section 2.4), where both are known. Layers further on make up
            for it, and the runtime gives what the converted model gives. For XNNPACK, ONNX Runtime and others with
            8-bit activations; it matters at few bits, where the steps are large.
        checkpoint: a folder in which each decision is kept as it is made: the recipe, each layer, each block,
            finetuning, the comparison with nearest. After an interruption of whatever kind the same call goes on from
            there, and gives the same bits as one that was not interrupted. Of several processes the first keeps them.
        memory_budget: bytes that batches of a loader, and what both networks know of all batches, may take in memory;
            what is beyond goes to files in a temporary folder (variable `TMPDIR`), which is removed in the end.
            `"auto"` is half of the memory that is free. The result is the same to the last bit. Models, moments and
            what is computed at the moment come on top.
        process_group: of `torch.distributed`, all of whose processes make this call, each with the same model and with
            its own shard of the data; `torch.distributed.group.WORLD` for all. They share the work, and end with the
            same integers, those that one process learns from all shards, up to the order of sums.

    Returns:
        The prepared model with learned weights, biases and frozen weight observers, to be converted by the host;
        `get_report` reads what was done.

    Raises:
        InvalidOptionError: torch is in inference mode, an option is out of range, an entry of `exclude`, the name of a
            block or of the token mask matches nothing, blocks share a layer or have no single end, a solver's answer is
            none, integer biases are asked for where there can be none, or with finetuning; the checkpoint is of another
            run, or the processes of a group have other models or options, which the error names; there are several
            processes, and no group is given; or there is no room on the disk for what is beyond the memory budget.
        InvalidModelError: not prepared, not calibrated, in train mode, not float32, nothing to quantize, or not what
            `float_model` computes; or a file of the checkpoint was changed.
        InvalidBatchError: no batches, one that does not fit the model or lies on another device, one that is another
            when it is read again, or a token mask of another shape or other entries.
        NonFiniteError: NaN or infinity in weights or activations; the layer is named.
        ProcessError: another process of the group failed, or is gone.
    """
    start = time.perf_counter()
    check_seed("seed", seed)
    for name, flag in {"progress": progress, "inplace": inplace, "integer_biases": integer_biases}.items():
        check_bool(name, flag)
    _check_mode()
    preset = _preset(method, finetune, integer_biases)
    chosen = preset.method
    folder = None if checkpoint is None else check_folder("checkpoint", checkpoint)
    with open_processes(process_group) as processes, ExitStack() as opened:
        host = open_host(prepared, backend_config, integer_biases=integer_biases)
        devices = sorted({node.weight.device for node in host.nodes}, key=str)
        sharing = processes.sharing("sharing out the memory", ", ".join(map(str, devices)))
        memory = opened.enter_context(Memory.of(memory_budget, devices, sharing))
        excluded = _excluded(host, exclude)
        chosen.check(host)
        others = {"exclude": sorted(excluded), "token_mask": token_mask, "seed": seed, "integer_biases": integer_biases}
        settings: dict[str, object] = {"method": chosen, "finetune": preset.finetune or False, **others}
        arguments = bind_batches(host.prepared, host.signature, host.flatten, data, inputs, memory=memory)
        if float_model is not None:
            check_original(host, float_model, arguments[0])
        mask, asked = mask_number(token_mask, host.inputs), (chosen.layers.holdout, chosen.layers.max_columns, seed)
        sampling = Sampling.of(arguments, *asked, mask=mask, processes=processes)
        sampling.check_tokens()
        kept = open_checkpoint(folder, processes, host, arguments, settings, _VERSIONS)
        with torch.no_grad(), Progress(progress and processes.rank == 0) as bar:
            report = ReportBuilder(bar)
            setup = time.perf_counter() - start
            common: dict[str, Any] = {"excluded": excluded, "report": report, "checkpoint": kept, "memory": memory}
            layers = choose_recipe(chosen, host, arguments, sampling, **common)
            chosen = chosen.with_layers(layers)
            trials = time.perf_counter() - start - setup
            comparison = Comparison(host, arguments, sampling, memory)
            run = Pass(host, arguments, sampling, seed=seed, **common)
            bar.stage("learning", len(run.nodes))
            # from here on the pass alone keeps all batches
            del arguments
            entry = None if preset.finetune is None else run.snapshot()
            chosen.learn(run)
            if preset.finetune is not None and entry is not None:
                preset.finetune.learn(run, layers, entry)
            del entry
            with run.clock("compare"):
                output_error, nearest_output_error = comparison.take_back(run)
            model = host.copy()
            host.write(model, run.roundings, run.scales)
    model.meta[KEY] = report.build(
        method=method if isinstance(method, str) else type(chosen).__name__,
        solver=type(get_solver(layers.solver)).__name__,
        recipe=str(layers.recipe),
        skipped=[*host.skipped, *_excluded_entries(host, excluded)],
        output_error=output_error,
        nearest_output_error=nearest_output_error,
        seconds={"setup": setup, **run.seconds, "trials": trials, "total": time.perf_counter() - start},
        settings={**settings, "method": chosen},
        versions=_VERSIONS,
        weights={node.name: digest(node.weight) for node in host.nodes},
        recalled=kept.recalled,
        processes=processes.size,
        memory={"budget": memory.budget or 0, **asdict(memory.use)},
    )
    return handed_over(host, model, inplace, KEY)


def _preset(method: str | Method | Preset, finetune: bool | Finetune | None, integer_biases: bool) -> Preset:
    """What is to be done."""
    preset = get_preset(method)
    if finetune is not None:
        if not isinstance(finetune, bool | Finetune):
            raise InvalidOptionError("finetune", f"{finetune!r} is not known", "Pass True, False or a Finetune.")
        preset = Preset(preset.method, (preset.finetune or Finetune()) if finetune is True else finetune or None)
    if integer_biases and preset.finetune is not None:
        raise InvalidOptionError(
            "integer_biases",
            "finetuning moves the scales that they are multiples of",
            "Leave it out, or pass finetune=False.",
        )
    return preset


def _excluded(host: Host, exclude: Exclude) -> frozenset[str]:
    """Names of the weighted nodes that the caller excludes."""
    if isinstance(exclude, str | type):
        exclude = (exclude,)
    entries = list(exclude) if isinstance(exclude, Iterable) else [exclude]
    if not all(isinstance(entry, str) or _is_module_type(entry) for entry in entries):
        raise InvalidOptionError(
            "exclude", f"{exclude!r} has no names or types", "Pass a list of names and module types."
        )
    node_of = {name: node.name for node in host.nodes for name in node.names}
    skipped = [entry.name for entry in host.skipped]
    found: set[str] = set()
    for entry in entries:
        if isinstance(entry, str):
            found.update(node_of.get(name, "") for name in select(entry, [*node_of, *skipped], "exclude"))
            continue
        of_type = [node.name for node in host.nodes if host.is_type(node, entry)]
        kinds = dict.fromkeys([*(node.kind for node in host.nodes), *(one.kind for one in host.skipped)])
        if not of_type and entry.__name__ not in kinds:
            raise InvalidOptionError(
                "exclude", f"no layer is a {entry.__name__}; there are {list(kinds)}", "Leave it out, or name layers."
            )
        found.update(of_type)
    return frozenset(found - {""})


def _is_module_type(entry: Any) -> bool:
    return isinstance(entry, type) and issubclass(entry, nn.Module)


def _excluded_entries(host: Host, excluded: frozenset[str]) -> list[Skipped]:
    reason = "excluded by the caller: rounded to nearest on its grid"
    return [Skipped(node.name, node.kind, reason) for node in host.nodes if node.name in excluded]


def _check_mode() -> None:
    """Raise `InvalidOptionError` where torch takes no derivatives, whatever is asked."""
    if torch.is_inference_mode_enabled():
        raise InvalidOptionError(
            "adaround", "is called in torch.inference_mode(), which takes no derivatives", "Call it outside."
        )
