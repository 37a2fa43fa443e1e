"""What the blocks of a model are called with, batch by batch, without running the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaround_plugin.errors import InvalidBatchError, InvalidModelError
from adaround_plugin.graph.compat import tree_flatten, tree_map, tree_names
from adaround_plugin.sequential.programs import Call, without_cache

__all__ = ["BlockCall", "copied", "first_calls"]


@dataclass(frozen=True)
class BlockCall:
    """How the first block is called in one batch.

    Attributes:
        structure: of the arguments.
        leaves: of the arguments; floating-point tensors in float32, and infinities in masks as its largest numbers.
        hidden: the number of the leaf that is the hidden states, `(samples, tokens, width)`.
        mask: `(samples, tokens)`, which tokens count, or None.
    """

    structure: Any
    leaves: list[Any]
    hidden: int
    mask: Tensor | None

    @property
    def constants(self) -> list[Any]:
        """The leaves, with None in place of tensors."""
        return [None if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors beside the hidden states, by the number of their leaf."""
        return {
            f"t{number}": leaf
            for number, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and number != self.hidden
        }


class _ReachedError(Exception):
    """A block was reached; nothing of the model is to run any further."""


def first_calls(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Any], token_mask: str | None
) -> list[BlockCall]:
    """How the first block is called in each batch; other blocks take the same, but for the hidden states.

    Raises:
        InvalidModelError: a block takes something else, or is not called with hidden states.
        InvalidBatchError: no batches, one without the token mask, or one in which blocks are called otherwise than in
            the first.
    """
    found: list[BlockCall] = []
    with torch.no_grad(), without_cache(model):
        for number, batch in enumerate(batches):
            if not found:
                _check_alike(model, blocks, batch)
            call = _first_call(model, blocks[0], batch, _mask(batch, token_mask, number))
            _check_same_kind(found[0] if found else call, call, number)
            found.append(call)
    if not found:
        raise InvalidBatchError("data", "has no batches", "Pass a list or a DataLoader.")
    return found


def copied(value: Any) -> Any:
    """A nested input with its tensors cloned: a model may write to it, and a caller use its memory again."""

    def leaf(one: Any) -> Any:
        if isinstance(one, Tensor):
            return one.detach().clone()
        # of classes that torch does not look into
        return {key: copied(entry) for key, entry in one.items()} if isinstance(one, Mapping) else one

    return tree_map(leaf, value)


def _run(model: nn.Module, batch: Any) -> None:
    """Call a model on a copy of a batch: a mapping by name, a tuple or list by position."""
    batch = copied(batch)
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def _first_call(model: nn.Module, block: nn.Module, batch: Any, mask: Tensor | None) -> BlockCall:
    """How a block is called, which the model has been seen to do."""
    seen: list[Call] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _ReachedError

    handle = block.register_forward_pre_hook(take, prepend=True, with_kwargs=True)
    try:
        with suppress(_ReachedError):
            _run(model, batch)
    finally:
        handle.remove()
    leaves, structure = tree_flatten(seen[0])
    hidden = _hidden(leaves)
    kept = [_kept(leaf, number == hidden) for number, leaf in enumerate(leaves)]
    return BlockCall(structure, kept, hidden, mask)


def _kept(leaf: Any, is_hidden: bool) -> Any:
    """An argument as it is kept: masks that are added to scores may hold infinities, hidden states may not."""
    if not _is_float(leaf):
        return leaf
    value = leaf.detach().float()
    largest = torch.finfo(torch.float32).max
    return value if is_hidden else value.clamp(-largest, largest)


def _check_same_kind(first: BlockCall, call: BlockCall, number: int) -> None:
    """Raise `InvalidBatchError` unless a batch differs from the first one in tensors alone: one program takes all."""
    differs = None
    if call.structure != first.structure or call.hidden != first.hidden:
        differs = "other arguments"
    else:
        for name, one, other in zip(tree_names(first.structure), first.leaves, call.leaves, strict=True):
            if isinstance(one, Tensor) != isinstance(other, Tensor):
                there, here = ("a tensor" if isinstance(leaf, Tensor) else repr(leaf) for leaf in (one, other))
                differs = f"{here} for {name}, which is {there}"
            elif not isinstance(one, Tensor) and not _same(one, other):
                differs = f"{other!r} for {name}, which is {one!r}"
    if differs is not None:
        raise InvalidBatchError(
            f"batch {number}",
            f"calls the blocks with {differs} in batch 0",
            "Pass batches that differ in their tensors alone: pad some of each, or none.",
        )


def _hidden(leaves: Sequence[Any]) -> int:
    """The number of the leaf that is the hidden states: the first floating-point tensor."""
    number = next((number for number, leaf in enumerate(leaves) if _is_float(leaf)), None)
    if number is None:
        raise InvalidModelError("blocks", "the first one takes no floating-point tensor", "Name blocks of a decoder.")
    return number


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _mask(batch: Any, name: str | None, number: int) -> Tensor | None:
    if name is None:
        return None
    value = batch.get(name) if isinstance(batch, Mapping) else None
    if not isinstance(value, Tensor):
        raise InvalidBatchError(f"batch {number}", f"has no tensor {name!r}", "Pass dicts that have the token mask.")
    return value


def _check_alike(model: nn.Module, blocks: Sequence[nn.Module], batch: Any) -> None:
    """Run one batch through the whole model: all blocks must take the same beside the hidden states."""
    seen: list[tuple[list[Any], Any]] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(tree_flatten((args, kwargs)))

    handles = [block.register_forward_pre_hook(take, with_kwargs=True) for block in blocks]
    try:
        _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != len(blocks):
        raise InvalidModelError("blocks", f"{len(blocks)} are run {len(seen)} times", "Name blocks that run once each.")
    first, structure = seen[0]
    hidden = _hidden(first)
    for number, (leaves, other) in enumerate(seen):
        pairs = [pair for place, pair in enumerate(zip(first, leaves, strict=False)) if place != hidden]
        if other != structure or not all(_same(*pair) for pair in pairs):
            raise InvalidModelError(
                f"block {number}",
                "is called with other arguments than the first, beside its hidden states",
                "Use adaround on the whole model.",
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (
            (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(one, other.to(one.device))
        )
    return type(one) is type(other) and (one is other or bool(one == other))
