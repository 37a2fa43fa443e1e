"""Models and their blocks as exported programs that take every batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaround_plugin.errors import InvalidModelError, told_as
from adaround_plugin.graph.compat import tree_unflatten
from adaround_plugin.hosts.pt2e.exports import strictly_exported

__all__ = ["Call", "PairedBlock", "exported", "without_cache"]

# positional arguments, and those by name
Call = tuple[tuple[Any, ...], dict[str, Any]]


class PairedBlock(nn.Module):
    """A block as a function of the hidden states of either stream, and of what else varies.

    The second hidden states and the mask are inputs that the block itself does not read: `PAIR` tells the host that the
    quantized stream takes the second ones, and the mask says which tokens count.

    Args:
        block: called as the model calls it.
        structure: of the call, for `tree_unflatten`.
        constants: its leaves; None where a tensor goes.
        hidden: the number of the leaf that is the hidden states.
    """

    def __init__(self, block: nn.Module, structure: Any, constants: Sequence[Any], hidden: int) -> None:
        super().__init__()
        self.block = block
        self._structure, self._constants, self._hidden = structure, list(constants), hidden

    def forward(self, hidden: Tensor, other: Tensor, tensors: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """Hidden states behind the block, `(samples, tokens, width)`; `tensors` are by the number of their leaf."""
        leaves = list(self._constants)
        leaves[self._hidden] = hidden
        for name, value in tensors.items():
            leaves[int(name[1:])] = value
        args, kwargs = tree_unflatten(leaves, self._structure)
        output: Any = self.block(*args, **kwargs)
        made: Tensor = output[0] if isinstance(output, tuple) else output
        return made


def exported(model: nn.Module, calls: Sequence[Call], name: str = "model") -> fx.GraphModule:
    """The model as a program that takes every call.

    Raises:
        InvalidModelError: torch.export fails on it; `name` says what it is.
    """
    (args, kwargs), *others = calls
    shapes: Any = torch.export.AdditionalInputs()  # type: ignore[no-untyped-call]
    for other in others:
        shapes.add(*other)

    def refused(error: Exception) -> InvalidModelError:
        remedy = "Change what it names, or leave the code out of the model."
        return InvalidModelError(name, f"torch.export fails on it ({error})", remedy)

    with told_as(refused), without_cache(model):
        program = strictly_exported(model, args, kwargs, shapes).module()
    assert isinstance(program, fx.GraphModule)
    return program


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Let a language model of transformers return no keys and values, which no program can, inside."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", False) is not True:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True
