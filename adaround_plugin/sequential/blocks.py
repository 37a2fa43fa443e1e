"""`adaround_blocks(...)`: a language model block by block, with torchao's tensors in the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from adaround_plugin.deployment.torchao_tensors import to_torchao
from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.report import KEY, Report
from adaround_plugin.sequential.learning import find_blocks, learned_blocks, together
from adaround_plugin.sequential.weights import StoredWeights, stored_weights

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
        **options: of `adaround`: `method`, `finetune`, `seed`, `progress`, `memory_budget`, and `checkpoint`, a folder
            in which each block has its own.

    Returns:
        `model`, whose linear layers in the blocks hold torchao's tensors (`to_torchao`), in the dtype and where the
        block was; `get_report` reads the report of all of them.

    Raises:
        InvalidOptionError: an option is out of range, or a file of `weights` cannot be read.
        InvalidModelError: no such blocks, train mode, a block that is called with other arguments than the first, or
            that torch.export fails on; tensors on `meta` that the files lack or hold in another shape, or tensors in
            the files that the model has not. All but the export is known before work starts.
        InvalidBatchError: no batches, or one without the token mask.
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
    for one in learned_blocks(model, batches, blocks, lambda *_: quantizer, **options):
        quantized: Any = to_torchao(one.paired, one.program, inplace=True)
        kind, device = _kind(one.name, originals[one.name], stored)
        made[one.name] = quantized.block.to(device=device, dtype=kind)
        reports.append(one.report)
    if stored is not None:
        stored.fill(model, without=blocks)
    for name, block in made.items():
        model.set_submodule(name, block)
    vars(model)[KEY] = together(reports)
    return model


def _kind(name: str, block: nn.Module, stored: StoredWeights | None) -> tuple[torch.dtype, torch.device]:
    """Where a block is, or is to be, and in what dtype: that of its first parameter."""
    inside, first = next(block.named_parameters())
    if first.is_meta:
        assert stored is not None
        return stored.dtype_of(f"{name}.{inside}"), stored.device
    return first.dtype, first.device
