"""The range of each channel of the activations between two layers, seen on calibration data."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaround_plugin.equalization.layer_pairs import LayerPair
from adaround_plugin.errors import InvalidBatchError, NonFiniteError, told_as
from adaround_plugin.regions.binding import bind_batches

__all__ = ["activation_ranges"]

# of the magnitudes in a batch; the largest few would set the scale of a channel by chance
_OUTLIERS = 1e-3


def activation_ranges(
    model: nn.Module, pairs: Sequence[LayerPair], batches: Iterable[Any], inputs: Callable[[Any], Any] | None
) -> list[Tensor]:
    """`(channels,)` of each pair, in float64 on the CPU: what the second layer reads.

    A range is the magnitude that one in a thousand exceeds in a batch, or the largest of fewer; the mean of all
    batches, weighed by their length.

    Args:
        model: that of the pairs, float32.
        pairs: found in it.
        batches, inputs: as for `adaround`.

    Raises:
        InvalidBatchError: no batches, or one that does not fit the model.
        InvalidOptionError: `inputs` cannot be called.
        NonFiniteError: NaN or infinity in the activations; batch and layer are named.
    """
    arguments = bind_batches(
        model,
        inspect.signature(model.forward),
        lambda bound: [bound.args, bound.kwargs],
        batches,
        inputs,
        argument="activations",
    )
    totals = [_Total(pair) for pair in pairs]
    hooks = [one.pair.second.module.register_forward_pre_hook(one.see, with_kwargs=True) for one in totals]
    try:
        for index, (args, kwargs) in enumerate(arguments):
            with told_as(functools.partial(_misfit, index)):
                # a model may write into its inputs
                model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            for one in totals:
                if not one.is_finite:
                    raise NonFiniteError(
                        f"batch {index}",
                        f"layer {one.pair.second.name!r} reads NaN or infinity",
                        "Repair the float model, or remove the batch.",
                    )
    finally:
        for hook in hooks:
            hook.remove()
    return [one.ranges / one.activations for one in totals]


def _misfit(index: int, error: Exception) -> InvalidBatchError:
    problem = f"the model does not run on it ({error})"
    return InvalidBatchError(f"batch {index}", problem, "Pass batches like the example inputs.")


class _Total:
    """The ranges of a pair's activations, summed over batches.

    Attributes:
        ranges: `(channels,)`, each batch times the activations that a channel has in it.
        activations: of a channel, so far.
        is_finite: whether all were.
    """

    def __init__(self, pair: LayerPair) -> None:
        self.pair = pair
        self.ranges = torch.zeros((), dtype=torch.float64, device="cpu")
        self.activations = 0
        self.is_finite = True

    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add what the second layer is called with."""
        x: Tensor = args[0] if args else kwargs["input"]
        entries = x.movedim(self.pair.axis, 0)
        magnitudes = entries.reshape(len(entries) // self.pair.repeat, -1).abs()
        count = magnitudes.shape[1]
        found = magnitudes.kthvalue(count - int(_OUTLIERS * count), dim=1).values
        self.ranges = self.ranges + count * found.to("cpu", torch.float64)
        self.activations += count
        self.is_finite &= bool(torch.isfinite(magnitudes).all())
