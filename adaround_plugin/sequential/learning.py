"""Learn one block after the other, carrying the hidden states of both streams along."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from adaround_plugin.api import adaround
from adaround_plugin.errors import InvalidModelError
from adaround_plugin.files import check_folder
from adaround_plugin.graph.compat import tree_flatten
from adaround_plugin.graph.reparametrized import deep_copy
from adaround_plugin.hosts.pt2e.host import PAIR
from adaround_plugin.hosts.pt2e.layer_options import layer_names
from adaround_plugin.hosts.pt2e.nodes import LEFT_IN_FLOAT, described, is_torchao_observer
from adaround_plugin.report import Report, get_report
from adaround_plugin.sequential.inputs import BlockCall, copied, first_calls
from adaround_plugin.sequential.programs import PairedBlock, exported
from adaround_plugin.sequential.weights import StoredWeights

__all__ = ["INSIDE", "LearnedBlock", "find_blocks", "learned_blocks", "together"]

# what the names of a block's layers begin with
INSIDE = "block."
_MASK = "mask"


@dataclass(frozen=True)
class LearnedBlock:
    """A block that is decided.

    Attributes:
        name: qualified name in the model.
        paired: the float block in float32, as it was exported.
        program: what `adaround` returned for it; None where the quantizer leaves all of it in float.
        layers: name and kind of its layers in such a program.
    """

    name: str
    paired: PairedBlock
    program: fx.GraphModule | None
    layers: tuple[tuple[str, str], ...] = ()

    @property
    def report(self) -> Report:
        """The report, with the layers' names in the model."""
        if self.program is None:
            skipped = [(self.outside(name), kind, LEFT_IN_FLOAT) for name, kind in self.layers]
            return Report(method="", solver="", recipe="", layers=[], skipped=skipped)
        report = get_report(self.program)

        def named(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(map(self.outside, names))

        return replace(
            report,
            layers=[replace(layer, name=self.outside(layer.name), tied=named(layer.tied)) for layer in report.layers],
            # what is the whole network there is a block here
            blocks=[
                replace(block, name=self.outside(block.name), layers=named(block.layers))
                for block in report.learned_on_samples
            ],
            finetuning=None,
            trials=[replace(trial, recipe=f"{self.name}: {trial.recipe}") for trial in report.trials],
            skipped=[(self.outside(name), kind, reason) for name, kind, reason in report.skipped],
            weights={self.outside(name): digest for name, digest in report.weights.items()},
        )

    def outside(self, name: str) -> str:
        """The name of a layer in the model."""
        return f"{self.name}.{name.removeprefix(INSIDE)}"


def find_blocks(model: nn.Module, blocks: str) -> dict[str, nn.Module]:
    """The blocks of a model by name, in order.

    Raises:
        InvalidModelError: there is no `nn.ModuleList` of that name, or the model is in train mode.
    """
    if model.training:
        raise InvalidModelError("model", "is in train mode", "Call .eval() first.")
    modules = dict(model.named_modules())
    found = modules.get(blocks)
    if not isinstance(found, nn.ModuleList) or not len(found):
        lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
        raise InvalidModelError("blocks", f"{blocks!r} is no list of blocks; there are {lists}", "Name one of these.")
    return {f"{blocks}.{number}": block for number, block in enumerate(found)}


def learned_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    blocks: str,
    quantizer_of: Callable[[str, fx.GraphModule], Quantizer],
    *,
    weights: StoredWeights | None = None,
    token_mask: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Iterator[LearnedBlock]:
    """The blocks one by one as they are decided; the model is not changed.

    Each imitates what the float block makes of the float stream's hidden states, from those of the quantized stream,
    which has gone through the learned blocks before it.

    Args:
        model: a language model whose blocks are called one after the other.
        batches: mappings (keyword arguments), tuples or tensors.
        blocks: name of the `nn.ModuleList`.
        quantizer_of: from the name of a block and its program to what prepares it.
        weights: where the tensors are that the model has on the device `meta`.
        token_mask: as of `adaround`, in batches that are mappings.
        checkpoint: as of `adaround`: each block has a folder of its own in it.
        **options: of `adaround`.

    Raises:
        InvalidOptionError: an option is out of range.
        InvalidModelError: as of `find_blocks` and `first_calls`, or a block cannot be exported.
        InvalidBatchError: as of `first_calls`.
    """
    folder = None if checkpoint is None else check_folder("checkpoint", checkpoint)
    found = find_blocks(model, blocks)
    handles = [] if weights is None else weights.lend(model, blocks, found)
    try:
        calls = first_calls(model, list(found.values()), batches, token_mask)
    finally:
        for handle in handles:
            handle.remove()
    pairs = [(call.leaves[call.hidden], call.leaves[call.hidden]) for call in calls]
    for name, block in found.items():
        paired = _paired(name, block, calls[0], weights)
        data = [_data(call, *pair) for call, pair in zip(calls, pairs, strict=True)]
        program = exported(paired, [((), batch) for batch in _one_of_each_shape(data)], name)
        layers = tuple(dict.fromkeys((layer, described(node, layer)) for node, layer in layer_names(program).items()))
        prepared = prepare_pt2e(program, quantizer_of(name, program)) if layers else program
        assert isinstance(prepared, fx.GraphModule)
        if not any(map(is_torchao_observer, prepared.modules())):
            with torch.no_grad():
                pairs = [(_run(paired, batch, "hidden"), _run(paired, batch, "other")) for batch in data]
            yield LearnedBlock(name, paired, None, layers)
            continue
        with torch.no_grad():
            _run(prepared, data[0], "hidden")  # weight observers see their weights
        prepared.meta[PAIR] = "hidden", "other"
        mask = None if token_mask is None else _MASK
        kept = None if folder is None else folder / name
        learned = adaround(prepared, data, token_mask=mask, checkpoint=kept, **options)
        with torch.no_grad():
            # a learned program has its weights on the grid, so that it computes what the converted one does
            pairs = [(_run(paired, batch, "hidden"), _run(learned, batch, "other")) for batch in data]
        yield LearnedBlock(name, paired, learned)
        # graphs are in cycles with their nodes: those of several blocks would wait for the collector
        del paired, program, prepared, learned
        gc.collect()


def together(reports: list[Report]) -> Report:
    """What was done to all blocks, in one report: the error is that of the output of the last one that was learned.

    Where trials chose different recipes, no settings repeat all of it without trials, and there are none.

    Raises:
        InvalidModelError: none was.
    """
    learned = [report for report in reports if report.layers]
    if not learned:
        raise InvalidModelError("blocks", "have no layer that is quantized", "Check the quantizer's configuration.")
    recipes = {report.recipe for report in learned}
    phases = dict.fromkeys(phase for report in reports for phase in report.seconds)
    return replace(
        learned[-1],
        recipe=recipes.pop() if len(recipes) == 1 else "chosen for each block",
        settings=learned[-1].settings if all(one.settings == learned[-1].settings for one in learned) else {},
        trials=[trial for report in reports for trial in report.trials],
        blocks=[block for report in reports for block in report.blocks],
        memory={
            name: (sum if name == "written" else max)(report.memory.get(name, 0) for report in learned)
            for name in learned[-1].memory
        },
        layers=[layer for report in reports for layer in report.layers],
        skipped=[entry for report in reports for entry in report.skipped],
        weights={name: digest for report in reports for name, digest in report.weights.items()},
        recalled=sum(report.recalled for report in reports),
        seconds={phase: sum(report.seconds.get(phase, 0.0) for report in reports) for phase in phases},
    )


def _paired(name: str, block: nn.Module, call: BlockCall, weights: StoredWeights | None) -> PairedBlock:
    """A copy of a block in float32, where the hidden states are."""
    device = call.leaves[call.hidden].device
    work = deep_copy(block)
    if weights is not None:
        weights.fill(work, name, dtype=torch.float32)
    work = work.to(device=device, dtype=torch.float32)
    return PairedBlock(work, call.structure, call.constants, call.hidden).eval()


def _data(call: BlockCall, exact: Tensor, quantized: Tensor) -> dict[str, Any]:
    """A batch for a paired block."""
    batch: dict[str, Any] = {"hidden": exact, "other": quantized, "tensors": call.tensors}
    return batch if call.mask is None else {**batch, _MASK: call.mask}


def _run(program: nn.Module, batch: dict[str, Any], hidden: str) -> Any:
    """What a block makes of the hidden states of one of the streams, on a copy: it may write to its inputs."""
    return program(**copied({**batch, "hidden": batch[hidden]}))


def _one_of_each_shape(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One batch of each combination of shapes, of all tensors."""
    return list({tuple(leaf.shape for leaf in tree_flatten(batch)[0]): batch for batch in data}.values())
