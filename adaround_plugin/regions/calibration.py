"""Calibration batches: what a loader yields, fitted to the model's signature, and which columns of it are used."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaround_plugin.errors import InvalidBatchError, InvalidOptionError
from adaround_plugin.graph.memory import Memory
from adaround_plugin.processes import ALONE, Processes
from adaround_plugin.regions.batches import Batches, input_tensors, read_batches, sizes_of
from adaround_plugin.regions.masks import counted, read_masks
from adaround_plugin.rounding.linear_op import Patches

__all__ = ["Sampling", "bind_batches"]

_log = logging.getLogger(__name__)
_GOLDEN = 0.6180339887498949


def bind_batches(
    model: nn.Module,
    signature: inspect.Signature,
    flatten: Callable[[inspect.BoundArguments], list[Any]],
    batches: Iterable[Any],
    inputs: Callable[[Any], Any] | None,
    argument: str = "data",
    memory: Memory | None = None,
) -> Batches:
    """The arguments of every batch, as the model's graph takes them.

    Args:
        model: whose parameters say on which device batches must lie, if all of them lie on one.
        signature: its inputs.
        flatten: from bound arguments to the values of the graph's placeholders; raises `ValueError` on a misfit.
        batches: a DataLoader, a list, any iterable; a list stays where it is.
        inputs: maps a batch to the model's inputs, for example `lambda batch: batch[0]` to drop labels.
        argument: what the caller calls the batches, for errors.
        memory: where batches are kept that a loader or `inputs` makes; None keeps all of them in memory.

    Raises:
        InvalidBatchError: no batches, or a batch that does not fit the signature, or lies on another device.
        InvalidOptionError: `inputs` cannot be called.
    """
    if inputs is not None and not callable(inputs):
        raise InvalidOptionError("inputs", f"{inputs!r} is not callable", "Pass a function of one batch.")
    if isinstance(batches, Tensor | Mapping | str):
        raise InvalidBatchError(
            argument, f"is one {type(batches).__name__}, not a sequence of batches", "Pass [batch] instead."
        )
    if not isinstance(batches, Iterable) and not hasattr(type(batches), "__getitem__"):
        raise InvalidBatchError(
            argument, f"{type(batches).__name__} is not iterable", "Pass a DataLoader or a list of batches."
        )
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None

    def bind(batch: Any, number: int) -> list[Any]:
        return _bind(device, signature, flatten, batch, inputs, number)

    owned = inputs is not None or not isinstance(batches, Sequence)
    bound = read_batches(batches, bind, memory or Memory(), owned=owned)
    if not bound:
        raise InvalidBatchError(
            argument, "has no batches (perhaps an iterator that was already used up)", "Pass a list or a DataLoader."
        )
    _log.debug("%d calibration batches", len(bound))
    return bound


def _bind(
    device: torch.device | None,
    signature: inspect.Signature,
    flatten: Callable[[inspect.BoundArguments], list[Any]],
    batch: Any,
    inputs: Callable[[Any], Any] | None,
    index: int,
) -> list[Any]:
    given = inputs(batch) if inputs is not None else batch
    args = tuple(given) if isinstance(given, tuple | list) else () if isinstance(given, Mapping) else (given,)
    kwargs = dict(given) if isinstance(given, Mapping) else {}
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        shown = list(kwargs) if kwargs else [type(arg).__name__ for arg in args]
        raise InvalidBatchError(
            f"batch {index}",
            f"{shown} does not fit the model's inputs {list(signature.parameters)} ({error})",
            "Pass inputs= to map a batch to the model's inputs, for example inputs=lambda batch: batch[0].",
        ) from None
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if (foreign := _array(value)) is not None:
            raise InvalidBatchError(
                f"batch {index}",
                f"input {name!r} is a {type(foreign).__name__}, not a tensor",
                "Pass inputs= to make tensors, for example inputs=torch.from_numpy.",
            )
        for tensor in input_tensors(value):
            is_float = tensor.is_floating_point()
            # a lone number may come from anywhere; so may indices and lengths, which some operators want elsewhere
            if is_float and tensor.dim() and device not in (None, tensor.device):
                raise InvalidBatchError(
                    f"batch {index}",
                    f"input {name!r} lies on {tensor.device}, the model on {device}",
                    f"Pass inputs= to bring a batch there, for example inputs=lambda batch: batch.to({str(device)!r}).",
                )
            if tensor.is_meta:
                raise InvalidBatchError(
                    f"batch {index}", f"input {name!r} lies on the device meta, without values", "Pass data."
                )
            if not is_float:
                continue
            if tensor.dtype != torch.float32:
                raise InvalidBatchError(f"batch {index}", f"input {name!r} is {tensor.dtype}", "Pass float32.")
            if not torch.isfinite(tensor).all():
                raise InvalidBatchError(f"batch {index}", f"input {name!r} holds NaN or infinity", "Remove the sample.")
    tensors = input_tensors(list(bound.arguments.values()))
    if not tensors or not tensors[0].numel():
        raise InvalidBatchError(f"batch {index}", "holds no data", "Pass batches of at least one sample.")
    try:
        return flatten(bound)
    except ValueError as error:
        raise InvalidBatchError(
            f"batch {index}", f"does not fit the model ({error})", "Pass batches like the example inputs."
        ) from None


def _array(value: Any) -> Any:
    """The first array of numpy in a nested input; None if there is none."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    found = (_array(item) for item in value) if isinstance(value, list | tuple) else ()
    return next((one for one in found if one is not None), None)


@dataclass(frozen=True)
class Sampling:
    """Which columns of a layer's design matrix are used, and which samples are held out: deterministic and even.

    A sample is an entry of the leading axis of the model's first input, numbered through all batches, those of several
    processes one after the other; an operator whose leading axis is longer (tokens or windows folded into it) has equal
    runs of it per sample.

    Attributes:
        first, size: number of the first sample of each batch, and how many it has.
        every: one of each run of `every` samples is held out, of as many whole ones where that is no integer; 0 holds
            out none.
        max_columns: at most about this many columns per layer, a quarter of that for a convolution of four groups or
            more, or `per_weight` for each weight of a row where that is more.
        seed: shifts the output positions that are used where not all are.
        per_weight: see `max_columns`.
        processes: this one and those that have other batches.
        others: how many samples these have.
        mask: number of the input that says which tokens count; None where all do.
        masks: of each batch, `(samples, tokens)` bool; empty where all count.
        counted_share: of all tokens, those that count.
    """

    first: tuple[int, ...]
    size: tuple[int, ...]
    every: Fraction | int
    max_columns: int
    seed: int
    per_weight: int = 4
    processes: Processes = ALONE
    others: int = 0
    mask: int | None = None
    masks: tuple[Tensor, ...] = ()
    counted_share: float = 1.0

    @classmethod
    def of(
        cls,
        bound: Sequence[list[Any]],
        holdout: float,
        max_columns: int,
        seed: int,
        per_weight: int = per_weight,
        mask: int | None = None,
        processes: Processes = ALONE,
    ) -> Sampling:
        """The sampling of bound batches with a share `holdout` held out (at least one sample, if there are two).

        A share of one in `k` is one of each `k` samples; any other one is met to the nearest sample.

        Raises:
            InvalidBatchError: a mask is none.
        """
        size = sizes_of(bound)
        counts = processes.gathered("counting the samples", sum(size))
        *first, _ = accumulate(size, initial=sum(counts[: processes.rank]))
        total = sum(counts)
        every: Fraction | int = 0
        if holdout > 0 and total > 1:
            run = round(1 / holdout)
            is_one_in = math.isclose(run * holdout, 1)
            every = min(run, total) if is_one_in else Fraction(total, max(1, round(holdout * total)))
        found = cls(tuple(first), size, every, max_columns, seed, per_weight, processes, total - sum(size))
        if mask is None:
            return found
        masks = read_masks(mask, bound, size)
        tokens = processes.gathered(
            "counting the tokens", (sum(int(one.sum()) for one in masks), sum(one.numel() for one in masks))
        )
        share = sum(count for count, _ in tokens) / max(1, sum(of_all for _, of_all in tokens))
        return replace(found, mask=mask, masks=masks, counted_share=share)

    @property
    def total(self) -> int:
        """The number of samples, of all processes."""
        return sum(self.size) + self.others

    @property
    def largest(self) -> int:
        """The number of the largest batch: what it tells of how a network takes samples is true of others, too."""
        return max(range(len(self.size)), key=self.size.__getitem__)

    def numbers(self, batch: int) -> range:
        """The numbers of a batch's samples."""
        return range(self.first[batch], self.first[batch] + self.size[batch])

    def in_pieces(self, size: int) -> tuple[Sampling, list[list[int]]]:
        """The same samples in batches of at most `size`, and the numbers of those that each batch is made into."""
        starts = [range(0, length, size) for length in self.size]
        first = [begin + start for begin, of_batch in zip(self.first, starts, strict=True) for start in of_batch]
        sizes = [
            min(size, length - start) for length, of_batch in zip(self.size, starts, strict=True) for start in of_batch
        ]
        numbers = iter(range(len(sizes)))
        pieces = [[next(numbers) for _ in of_batch] for of_batch in starts]
        masks = tuple(part for mask in self.masks for part in torch.split(mask, size))
        return replace(self, first=tuple(first), size=tuple(sizes), masks=masks), pieces

    def mask_of(self, batch: int) -> Tensor | None:
        """`(samples, tokens)`, which tokens of a batch count; None where all do."""
        return self.masks[batch] if self.masks else None

    def has_samples(self, batch: int, length: int) -> bool:
        """Whether a leading axis of this length can be one of the batch's samples, or of equal runs of them."""
        return length % self.size[batch] == 0

    def samples(self, batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """For each of `length` entries of a leading axis the number of its sample in this batch: int64."""
        return torch.arange(length, device=device) * self.size[batch] // max(1, length)

    def held_out(self, batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """For each of `length` entries of a leading axis in this batch, whether its sample is held out: bool."""
        if not self.every:
            return torch.zeros(length, dtype=torch.bool, device=device)
        sample = self.first[batch] + self.samples(batch, length, device)
        long, by = self.every.numerator, self.every.denominator
        run = sample * by // long
        start, end = (-(-number * long // by) for number in (run, run + 1))
        # which one of each run moves with the golden ratio, so that it cannot fall in step with `columns`
        chosen = ((run + 1).double() * _GOLDEN).frac() * (end - start)
        return sample - start == chosen.long()

    def columns(self, batch: int, patches: Patches, sites: int) -> tuple[Tensor, Tensor]:
        """Chosen columns of one call site out of `sites`: `(n,)` leading indices and `(n,)` output positions.

        The leading axis is numbered through all batches; entry `i` gives `floor((i + 1) r) - floor(i r)` of its
        positions, spaced evenly from an offset that runs through the golden ratio's multiples. Those of tokens that do
        not count are left out.
        """
        length, positions, device = patches.samples, patches.positions, patches.x.device
        per_sample = length / self.size[batch]
        # the short rows of many groups ask for fewer
        most = max(self.max_columns // min(patches.groups, 4), self.per_weight * patches.row_length)
        # an expert that no token goes to has none
        counts = counted(self.mask_of(batch), (length, positions))
        share_of = 1.0 if counts is None else self.counted_share
        rate = min(1.0, most / max(1.0, share_of * sites * positions * per_sample * self.total))
        entry = self.first[batch] * per_sample + torch.arange(length, dtype=torch.float64, device=device)
        share = rate * positions
        count = (((entry + 1) * share + 1e-6).floor() - (entry * share + 1e-6).floor()).long()
        index = torch.repeat_interleave(torch.arange(length, device=device), count)
        rank = torch.arange(index.numel(), device=device) - (count.cumsum(0) - count)[index]
        offset = ((entry + self.seed) * _GOLDEN).frac()[index]
        position = ((rank + offset) * positions / count[index]).long().clamp_max(positions - 1)
        if counts is None:
            return index, position
        kept = counts.to(device)[(index, position) if counts.dim() == 2 else (index,)]
        return index[kept], position[kept]
