"""Which columns of calibration batches are used, and which samples are held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from adaround_plugin.errors import InvalidBatchError
from adaround_plugin.processes import ALONE, Processes
from adaround_plugin.regions.batches import sizes_of
from adaround_plugin.regions.masks import counted, read_masks
from adaround_plugin.rounding.linear_op import Patches

__all__ = ["Sampling"]

_GOLDEN = 0.6180339887498949
# seeds that choose other columns
_SEEDS = 2**20


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

    def check_tokens(self) -> None:
        """Raise where the masks of all data leave nothing; those of a part of them may.

        Raises:
            InvalidBatchError: no token counts, in any process.
        """
        if not self.counted_share:
            raise InvalidBatchError("data", "the token mask leaves no token", "Pass 1 for tokens, 0 for padding.")

    @property
    def own(self) -> int:
        """The number of this process's samples."""
        return sum(self.size)

    @property
    def total(self) -> int:
        """The number of samples, of all processes."""
        return self.own + self.others

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

    def own_numbers(self, batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """For each of `length` entries of a leading axis the number of its sample among this process's: int64."""
        return self.first[batch] - self.first[0] + self.samples(batch, length, device)

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
        # whatever the seed, a number whose products have digits behind the point
        offset = ((entry + self.seed % _SEEDS) * _GOLDEN).frac()[index]
        position = ((rank + offset) * positions / count[index]).long().clamp_max(positions - 1)
        if counts is None:
            return index, position
        kept = counts.to(device)[(index, position) if counts.dim() == 2 else (index,)]
        return index[kept], position[kept]
