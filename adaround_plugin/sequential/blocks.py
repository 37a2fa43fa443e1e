"""`adaround_blocks(...)`: a language model block by block, with torchao's tensors in the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantizer import Quantizer

from adaround_plugin.deployment.torchao_tensors import to_torchao
from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.hosts.pt2e.layer_options import layer_names
from adaround_plugin.names import matching, select
from adaround_plugin.report import Report, set_report
from adaround_plugin.sequential.learning import INSIDE, find_blocks, learned_blocks, together
from adaround_plugin.sequential.stored import named_tensors
from adaround_plugin.sequential.weights import StoredWeights, like, put, stored_weights

__all__ = ["adaround_blocks"]


def adaround_blocks(
    model: nn.Module,
    data: Iterable[Any],
    blocks: str,
    quantizer: AdaRoundWeightOnlyQuantizer,
    *,
    weights: str | os.PathLike[str] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    token_mask: str | None = None,
    **options: Any,
) -> nn.Module:
    """Learn the linear layers of a language model's blocks, one block in float32 at a time.

    The model may be in bfloat16 or float16, its blocks on any device. The hidden states of both streams are kept, where
    the batches are: for each batch two tensors of `(samples, tokens, width)` float32. What the network's own output
    needs is not known: each block is judged by its own output.

    Weights may stay in files, too: what the model has on the device `meta` is read from `weights` when it is its turn.
    The embedding and the head are there while the blocks' inputs are found, and in the end; one block's float weights
    while it is learned.

    Args:
        model: in eval mode; what is outside of the blocks stays as it is. It is changed as a whole when all is done.
        data: unlabelled batches: dicts (keyword arguments), tuples or tensors. Lengths may vary.
        blocks: name of the `nn.ModuleList`, such as `"model.layers"`.
        quantizer: bits, groups and so on; names in its `layers` are those inside a block, with `"block."` before them.
        weights: the files of what is on the device `meta`, in the safetensors format and by the model's names: one
            file, or a folder with `model.safetensors` or `model.safetensors.index.json`. Tensors have the dtype that
            they are stored in, and go where the model's first tensor is that is not on `meta`, else to the CPU.
        inputs: maps a batch to the model's inputs.
        token_mask: name of the input that says which tokens count, such as `"attention_mask"`.
        **options: of `adaround`: `method`, `finetune`, `seed`, `progress`, `memory_budget`, `process_group`, and
            `checkpoint`, a folder in which each block has its own.

    Returns:
        `model`, whose linear layers in the blocks hold torchao's tensors (`to_torchao`), each tensor in the dtype and
        where it was; `get_report` reads the report of all of them. Layers that the quantizer leaves in float stay so.

    Raises:
        InvalidOptionError: an option is out of range, or a file of `weights` cannot be read.
        InvalidModelError: no such blocks, train mode, a block that is called with other arguments than the first, or
            that torch.export fails on; tensors on `meta` that the files lack or hold in another shape, or tensors in
            the files that the model has not. All but the export is known before work starts.
        InvalidBatchError: no batches, one without the token mask, or one in which the blocks are called otherwise than
            in the first: with other numbers, or with a mask where there was none.
    """
    if not isinstance(quantizer, AdaRoundWeightOnlyQuantizer):
        raise InvalidOptionError(
            "quantizer", f"{quantizer!r} is none for weights alone", "Pass an AdaRoundWeightOnlyQuantizer."
        )
    batches = data if inputs is None else map(inputs, data)
    made: dict[str, nn.Module] = {}
    reports: list[Report] = []
    originals = find_blocks(model, blocks)
    stored = stored_weights(model, weights)
    options = {"weights": stored, "token_mask": token_mask, **options}
    for one in learned_blocks(model, batches, blocks, _quantizers(quantizer, originals), **options):
        if one.program is not None:
            to_torchao(one.paired, one.program, inplace=True)
        made[one.name] = _restored(one.paired.block, one.name, originals[one.name], stored)
        reports.append(one.report)
    report = together(reports)
    if stored is not None:
        stored.fill(model, without=blocks)
    for name, block in made.items():
        model.set_submodule(name, block)
    set_report(model, report)
    return model


def _quantizers(
    quantizer: AdaRoundWeightOnlyQuantizer, blocks: Mapping[str, nn.Module]
) -> Callable[[str, fx.GraphModule], Quantizer]:
    """The quantizer of each block's program: of its linear layers, by those of the names that are there.

    Raises:
        InvalidOptionError: an entry of `layers` matches no linear layer of any block.
    """
    modules = (entry for block in blocks.values() for entry in block.named_modules())
    known = dict.fromkeys(INSIDE + name for name, module in modules if isinstance(module, nn.Linear))
    for pattern in quantizer.layers:
        select(pattern, known, _entry(pattern))

    def of(_: str, program: fx.GraphModule) -> Quantizer:
        names = list(layer_names(program).values())
        made = copy(quantizer)
        made.linear_only = True
        made.layers = {
            pattern: changed
            for pattern, changed in quantizer.layers.items()
            if matching(pattern, names, _entry(pattern))
        }
        return made

    return of


def _entry(pattern: str) -> str:
    return f"layers[{pattern!r}]"


def _restored(made: nn.Module, name: str, block: nn.Module, stored: StoredWeights | None) -> nn.Module:
    """A block that was worked on in float32, each tensor where it was, or is to be, and in its dtype.

    What did not change is the tensor that was there; what is new, such as a bias, is as the weight beside it.
    """
    former: dict[str, tuple[torch.dtype, torch.device]] = {}
    same: dict[str, Tensor] = {}
    worked_on = dict(named_tensors(made))
    for inside, tensor in named_tensors(block):
        if not tensor.is_meta:
            former[inside] = tensor.dtype, tensor.device
            new = worked_on.get(inside)
            if type(new) in (Tensor, nn.Parameter) and new is not None and torch.equal(tensor.to(new), new):
                same[inside] = tensor
        elif stored is not None:
            kind = stored.dtype_of(f"{name}.{inside}") if tensor.is_floating_point() else tensor.dtype
            former[inside] = kind, stored.device
    moved: dict[int, Tensor] = {}
    for inside, tensor in named_tensors(made):
        parent, _, _ = inside.rpartition(".")
        kind, device = former.get(inside) or former[f"{parent}.weight" if parent else "weight"]
        if id(tensor) not in moved:
            value = same[inside] if inside in same else tensor.to(device=device, dtype=kind)
            moved[id(tensor)] = like(tensor, value)
    put(made, {inside: moved[id(tensor)] for inside, tensor in named_tensors(made)})
    return made
