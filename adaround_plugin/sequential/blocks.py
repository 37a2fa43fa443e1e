"""`adaround_blocks(...)`: a language model block by block, with torchao's tensors in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from adaround_plugin.deployment.torchao_tensors import to_torchao
from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.report import KEY, Report
from adaround_plugin.sequential.learning import find_blocks, learned_blocks, together

__all__ = ["adaround_blocks"]


def adaround_blocks(
    model: nn.Module,
    data: Iterable[Any],
    blocks: str,
    quantizer: AdaRoundWeightOnlyQuantizer,
    *,
    inputs: Callable[[Any], Any] | None = None,
    token_mask: str | None = None,
    **options: Any,
) -> nn.Module:
    """Learn the linear layers of a language model's blocks, one block in float32 at a time.

    The model may be in bfloat16 or float16, its blocks on any device. The hidden states of both streams are kept, where
    the batches are: for each batch two tensors of `(samples, tokens, width)` float32. What the network's own output
    needs is not known: each block is judged by its own output.

    Args:
        model: in eval mode; what is outside of the blocks stays as it is. It is changed as a whole when all is done.
        data: unlabelled batches: dicts (keyword arguments), tuples or tensors. Lengths may vary.
        blocks: name of the `nn.ModuleList`, such as `"model.layers"`.
        quantizer: bits, groups and so on; names in its `layers` are those inside a block, with `"block."` before them.
        inputs: maps a batch to the model's inputs.
        token_mask: name of the input that says which tokens count, such as `"attention_mask"`.
        **options: of `adaround`: `method`, `finetune`, `seed`, `progress`, `memory_budget`, and `checkpoint`, a folder
            in which each block has its own.

    Returns:
        `model`, whose linear layers in the blocks hold torchao's tensors (`to_torchao`), in the dtype and where the
        block was; `get_report` reads the report of all of them.

    Raises:
        InvalidOptionError: an option is out of range.
        InvalidModelError: no such blocks, train mode, a block that is called with other arguments than the first, or
            that torch.export fails on.
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
    for one in learned_blocks(model, batches, blocks, lambda *_: quantizer, token_mask=token_mask, **options):
        quantized: Any = to_torchao(one.paired, one.program, inplace=True)
        kind, device = _kind(originals[one.name])
        made[one.name] = quantized.block.to(device=device, dtype=kind)
        reports.append(one.report)
    for name, block in made.items():
        model.set_submodule(name, block)
    vars(model)[KEY] = together(reports)
    return model


def _kind(block: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Where a block is, and in what dtype: that of its first parameter."""
    first = next(block.parameters())
    return first.dtype, first.device
