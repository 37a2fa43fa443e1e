"""The error of a network's outputs, sample by sample, relative to how far the samples lie apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.masks import counted

__all__ = ["OutputError", "OutputTally"]

# a variance below this share of the mean square is none
_NO_VARIANCE = 1e-9


@dataclass(frozen=True)
class OutputError:
    """Relative squared errors of the samples of a pass, in order.

    Attributes:
        samples: `(S,)` float64.
        held_out: `(S,)`, whether a sample was kept out of learning.
        variances: of each output, over which its errors are taken.
    """

    samples: Tensor
    held_out: Tensor
    variances: Sequence[float] = ()

    @property
    def mean(self) -> float:
        """The mean over held-out samples; over all if there are none."""
        judged = self.samples[self.held_out] if bool(self.held_out.any()) else self.samples
        return float(judged.mean())


class OutputTally:
    """Adds up the errors of a network's outputs over batches.

    The mean squared error of each output is taken over the variance of its entries, each about its own mean over all
    samples, so that what all samples have in common does not count; then outputs count alike. Along an axis that is
    longer in some batches than in others, as that of tokens, entries have one mean.

    Tokens that do not count stay out; those that do have one mean, too. Entries that are no finite number in float,
    such as masked scores of minus infinity, count as right and as 0.

    Args:
        sampling: how many samples there are, which are held out, and which tokens count.
        variances: of each output, where they are known of more samples.
    """

    def __init__(self, sampling: Sampling, variances: Sequence[float] | None = None) -> None:
        self._sampling, self._variances = sampling, variances
        # by number of the output
        self._spread: dict[int, _Spread] = defaultdict(_Spread)
        self._errors: dict[int, list[Tensor]] = defaultdict(list)

    def add(self, batch: int, exact: Sequence[Tensor], quantized: Sequence[Tensor]) -> None:
        """Take in the float and the quantized outputs of one batch, floating-point tensors."""
        size, mask = self._sampling.size[batch], self._sampling.mask_of(batch)
        for number, (one, other) in enumerate(zip(exact, quantized, strict=True)):
            if not one.numel():
                self._errors[number].append(torch.zeros(size, dtype=torch.float64, device="cpu"))
                continue
            known = torch.isfinite(one)
            if not bool(known.all()):
                one, other = torch.where(known, one, 0.0), torch.where(known, other, 0.0)
            # an output without an axis of samples is one for all of them
            split = one.dim() > 0 and self._sampling.has_samples(batch, one.shape[0])
            error = (one - other).double().square()
            counts = counted(mask, one.shape) if split else None
            if counts is not None:
                counts = counts.to(one.device)
                self._spread[number].add(one[counts])
                self._errors[number].append(_mean_of_counted(error, counts, size))
                continue
            self._spread[number].add(one.reshape(size, -1, *one.shape[1:]) if split else one.unsqueeze(0))
            self._errors[number].append(error.reshape(size, -1).mean(1) if split else error.mean().expand(size))

    def finish(self) -> OutputError:
        """The errors of all batches."""
        sampling, variances = self._sampling, self._variances
        if variances is None:
            spreads = self._spreads()
            variances = [spreads[number].variance() if number in spreads else 0.0 for number in self._errors]
        found = torch.zeros(sum(sampling.size), dtype=torch.float64, device="cpu")
        # an output that never has an entry has no variance, and no error
        counted = sum(variance > 0 for variance in variances)
        for parts, variance in zip(self._errors.values(), variances, strict=True):
            if variance > 0:
                found += torch.cat([part.cpu() for part in parts]) / variance / counted
        held = torch.cat([sampling.held_out(batch, size) for batch, size in enumerate(sampling.size)])
        return OutputError(found, held, variances)

    def _spreads(self) -> Mapping[int, _Spread]:
        """By number of the output, over the samples of all processes."""
        processes = self._sampling.processes
        if processes.size == 1:
            return self._spread
        found: dict[int, _Spread] = defaultdict(_Spread)
        mine = {number: spread.sums() for number, spread in self._spread.items()}
        for of_one in processes.gathered("the variance of the outputs", mine):
            for number, sums in of_one.items():
                for shape, one in sums.items():
                    found[number].take(torch.Size(shape), *one)
        return found


def _mean_of_counted(error: Tensor, counts: Tensor, size: int) -> Tensor:
    """`(size,)`: of each sample's errors, those of tokens that count; 0 where none does."""
    by_token = error.reshape(*counts.shape, -1).mean(-1)
    kept = torch.where(counts, by_token, 0.0).reshape(size, -1).sum(1)
    return kept / counts.reshape(size, -1).sum(1).clamp_min(1)


class _Spread:
    """The variance of entries, each about its mean over samples."""

    def __init__(self) -> None:
        # by shape of a sample: how many, their sum, and that of their squares
        self._seen: dict[torch.Size, tuple[int, Tensor, float]] = {}

    def add(self, values: Tensor) -> None:
        """Take in `(n, ...)` values."""
        values = values.double()
        self.take(values.shape[1:], len(values), values.sum(0), float(values.square().sum()))

    def take(self, shape: torch.Size, new: int, by: Tensor, squares: float) -> None:
        """Take in how many values of a shape there were, their sum, and that of their squares."""
        count, total, square = self._seen.get(shape, (0, torch.zeros_like(by), 0.0))
        self._seen[shape] = count + new, total.to(by.device) + by, square + squares

    def sums(self) -> dict[tuple[int, ...], tuple[int, Tensor, float]]:
        """What `take` takes, on the CPU."""
        return {tuple(shape): (count, total.cpu(), square) for shape, (count, total, square) in self._seen.items()}

    def variance(self) -> float:
        """Of an entry on the mean; the mean square where there is none, 1 where that is 0."""
        count, total, square = self._together()
        entries = count * total.numel()
        variance = (square - float(total.square().sum()) / count) / entries
        if variance > _NO_VARIANCE * square / entries:
            return variance * count / (count - 1)
        return square / entries or 1.0

    def _together(self) -> tuple[int, Tensor, float]:
        """Samples of one shape, made of those of all by taking entries along an axis that differs as samples, too.

        All axes do where there is one sample.
        """
        shapes = list(self._seen)
        if len(shapes) == 1 and self._seen[shapes[0]][0] > 1:
            return self._seen[shapes[0]]
        same = len(shapes) > 1 and len({len(shape) for shape in shapes}) == 1
        common = [axis for axis in range(len(shapes[0])) if len({shape[axis] for shape in shapes}) == 1] if same else []
        count, sums = 0, []
        for seen, total, _ in self._seen.values():
            others = [axis for axis in range(total.dim()) if axis not in common]
            sums.append(total.sum(others) if others else total)
            count += seen * (total.numel() // sums[-1].numel())
        return count, torch.stack(sums).sum(0), sum(square for _, _, square in self._seen.values())
