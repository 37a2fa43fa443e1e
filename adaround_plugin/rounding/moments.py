"""Streaming second moments of one weighted operator: all that the rounding problem needs to know of the data.

With `x` a column of the float stream, `x^` the same column of the quantized stream and `W` the float weight, the
error of a quantized row `w^` with bias correction `b` is

    E (w x - w^ x^ - b)^2 = E (d + (w - w^) x^ - b)^2,   d = w (x - x^),

so the moments of `x^` and of the *deviation* `d` suffice (equation 25 of the AdaRound paper without its activation
function). Working with `d` rather than with `x` keeps small errors accurate: nothing large is subtracted. The
moments are weighted means over columns; they add over batches, call sites and machines (Chan, Golub and LeVeque 1983).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor

__all__ = ["HeldOut", "Moments", "joined"]

_GRAM_BLOCK = 512


class Moments:
    """Weighted means and centred second moments of `x^` (`D` columns) and `d` (`R` rows), per group.

    Attributes, all float64, valid after `finish()`:
        mean: `(G, D)`, `mu^ = E[x^]`.
        hessian: `(G, D, D)`, `H = E[(x^ - mu^)(x^ - mu^)^T]`.
        deviation: `(G, R)`, `E[d]`.
        cross: `(G, R, D)`, `E[(d - E d)(x^ - mu^)^T]`.
        power: `(G, R)`, `E[(d - E d)^2]`.
        total: `(G,)`, the sum of column weights.
        count: the number of columns seen.
    """

    def __init__(self, groups: int, rows: int, columns: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.total, self.mean, self.deviation = zeros(), zeros(columns), zeros(rows)
        self.hessian, self.cross, self.power = zeros(columns, columns), zeros(rows, columns), zeros(rows)
        self.count = 0

    @staticmethod
    def bytes(groups: int, rows: int, columns: int) -> int:
        """Memory that moments of this size take."""
        return 8 * groups * columns * (columns + rows)

    def add(self, x: Tensor, deviation: Tensor, weight: Tensor | None = None) -> None:
        """Take in `n` columns; every call goes through all sums, so that many at once are better than few.

        Args:
            x: `(G, n, D)`, columns of the quantized stream.
            deviation: `(G, n, R)`, `(x - x^) W^T`.
            weight: `(G, n)`, non-negative column weights; None for 1.
        """
        if not x.shape[1]:
            return
        self.count += x.shape[1]
        total, mean_x = _mean(x, weight)
        _, mean_d = _mean(deviation, weight)
        x, deviation = x - mean_x.unsqueeze(1), deviation - mean_d.unsqueeze(1)
        # what is left is not quite centred: the means carry float32's rounding error
        _, rest_x = _mean(x, weight)
        _, rest_d = _mean(deviation, weight)
        if weight is not None:
            root = weight.sqrt().unsqueeze(-1)
            x.mul_(root)
            deviation.mul_(root)
        self._merge(total, x, deviation, (mean_x, mean_d), (rest_x.double(), rest_d.double()))

    def finish(self) -> Moments:
        """The attributes are valid until the next `add`."""
        for start, stop in _blocks(self.hessian.shape[2]):
            self.hessian[:, :start, start:stop] = self.hessian[:, start:stop, :start].transpose(1, 2)
        return self

    def pool(self, add: Callable[..., None]) -> None:
        """Be the moments of all machines, once they are finished.

        Args:
            add: puts the sums over all machines into the tensors that it is given, in place.
        """
        count = self.total.new_tensor(self.count)
        own, mean, deviation = self.total.clone(), self.mean.clone(), self.deviation.clone()
        self.mean.mul_(own[:, None])
        self.deviation.mul_(own[:, None])
        add(count, self.total, self.mean, self.deviation)
        self.count = int(count)
        pooled = self.total.clamp_min(torch.finfo(torch.float64).tiny)
        self.mean.div_(pooled[:, None])
        self.deviation.div_(pooled[:, None])
        # second moments about the common mean: those about one's own, and the outer product of the difference
        share, dx, dd = own / pooled, mean - self.mean, deviation - self.deviation
        for moment, left, right in ((self.hessian, dx, dx), (self.cross, dd, dx)):
            moment.baddbmm_(left.unsqueeze(2), right.unsqueeze(1)).mul_(share[:, None, None])
        self.power.add_(dd.square()).mul_(share[:, None])
        add(self.hessian, self.cross, self.power)

    def merged(self, other: Moments) -> Moments:
        """Those of the columns of both, once they are finished."""
        found = copy(self)
        found.count, found.total = self.count + other.count, self.total + other.total
        pooled = found.total.clamp_min(torch.finfo(torch.float64).tiny)
        own, new = self.total / pooled, other.total / pooled
        dx, dd = other.mean - self.mean, other.deviation - self.deviation
        found.mean, found.deviation = self.mean + new[:, None] * dx, self.deviation + new[:, None] * dd

        def both(one: Tensor, another: Tensor) -> Tensor:
            share = (-1, *[1] * (one.dim() - 1))
            return own.view(share) * one + new.view(share) * another

        between = (own * new)[:, None]
        found.hessian = both(self.hessian, other.hessian).baddbmm_((between * dx).unsqueeze(2), dx.unsqueeze(1))
        found.cross = both(self.cross, other.cross).baddbmm_((between * dd).unsqueeze(2), dx.unsqueeze(1))
        found.power = both(self.power, other.power) + between * dd.square()
        return found

    def _merge(
        self,
        total: Tensor,
        x: Tensor,
        deviation: Tensor,
        centre: tuple[Tensor, Tensor],
        rest: tuple[Tensor, Tensor],
    ) -> None:
        """Pool with a chunk of columns that are centred but for a little rest, each times the root of its weight."""
        pooled = (self.total + total).clamp_min(torch.finfo(torch.float64).tiny)
        old, new = self.total / pooled, total / pooled  # (G,) shares of the pool
        mean_x, mean_d = (one.double() + left for one, left in zip(centre, rest, strict=True))
        dx, dd = mean_x - self.mean, mean_d - self.deviation
        # pooled mean of products = weighted mean of each + old * new * (difference of means)(...)^T
        between = (old * new)[:, None]
        left = torch.stack([between * dx, -new[:, None] * rest[0]], 2)
        right = torch.stack([dx, rest[0]], 1)
        for start, stop in _blocks(x.shape[2]):
            product = x[:, :, start:stop].transpose(1, 2) @ x[:, :, :stop]
            part = self.hessian[:, start:stop, :stop]
            part.mul_(old[:, None, None]).add_(product / pooled[:, None, None])
            part.baddbmm_(left[:, start:stop], right[:, :, :stop])
        self.cross.mul_(old[:, None, None]).add_((deviation.transpose(1, 2) @ x) / pooled[:, None, None])
        self.cross.baddbmm_(torch.stack([between * dd, -new[:, None] * rest[1]], 2), right)
        square = deviation.square().sum(1, dtype=torch.float64) / pooled[:, None]
        self.power.mul_(old[:, None]).add_(square + between * dd.square() - new[:, None] * rest[1].square())
        self.mean += new[:, None] * dx
        self.deviation += new[:, None] * dd
        self.total += total

    def terms(self, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`(H, E[d x^^T], E[d^2])`, about the means; else about 0, for a row whose bias must stay as it is."""
        if centred:
            return self.hessian, self.cross, self.power
        outer = self.mean.unsqueeze(2) * self.mean.unsqueeze(1)
        return (
            self.hessian + outer,
            self.cross + self.deviation.unsqueeze(2) * self.mean.unsqueeze(1),
            self.power + self.deviation.square(),
        )

    def error(self, change: Tensor, offset: Tensor | None = None) -> Tensor:
        """`E (d + (w - w^) x^ - b)^2` per row.

        Args:
            change: `(G, R, D)` float64, `w - w^`.
            offset: `(G, R)` float64, the `b` that is added to the bias; None for nothing.

        Returns:
            `(G, R)` float64, never negative.
        """
        mean = self.bias(change) if offset is None else self.bias(change) - offset
        return self.least_error(change) + mean.square()

    def least_error(self, change: Tensor) -> Tensor:
        """`error` with the best offset of each row, which is `bias`: `(G, R)` float64."""
        return (self.power + 2 * (change * self.cross).sum(-1) + self._quadratic(change)).clamp_min(0)

    @property
    def power_of_columns(self) -> Tensor:
        """`(G, D)`: `E[x^^2]` of each column."""
        return self.hessian.diagonal(dim1=1, dim2=2) + self.mean.square()

    def power_of(self, rows: Tensor) -> tuple[float, float]:
        """Variance and mean square of `w x^`, summed over `(G, R, D)` float64 rows `w`."""
        variance = float(self._quadratic(rows).sum())
        return variance, variance + float((rows @ self.mean.unsqueeze(2)).square().sum())

    def bias(self, change: Tensor) -> Tensor:
        """The bias correction `E[d] + (w - w^) mu^` that absorbs the mean error, `(G, R)` float64."""
        return self.deviation + (change.double() @ self.mean.unsqueeze(2)).squeeze(2)

    def _quadratic(self, rows: Tensor) -> Tensor:
        # the product in float32 is exact enough, since the sum has no large terms that cancel
        return ((rows.float() @ self.hessian.float()).double() * rows).sum(-1)


class HeldOut:
    """Columns that are not learned from, kept as they are: few enough to judge a rounding by each of them.

    Attributes:
        count: the number of columns.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.count = 0

    def add(self, x: Tensor, deviation: Tensor, weight: Tensor | None = None) -> None:
        """Take in columns; arguments as for `Moments.add`, of which each call gives a weight or none does; copied."""
        if x.shape[1]:
            self._parts.append((x.clone(), deviation.clone(), None if weight is None else weight.clone()))
            self.count += x.shape[1]

    def finish(self) -> HeldOut:
        """Be ready to judge."""
        if self.count:
            x, deviation, weight = zip(*self._parts, strict=True)
            self._x, self._deviation = joined(x), joined(deviation)
            self._weight = None if weight[0] is None else joined(weight)
            self._parts = []
        return self

    def pool(self, gather: Callable[[Tensor], Tensor], none: Tensor) -> None:
        """Have the columns of all machines, once they are finished.

        Args:
            gather: puts the tensors of all machines one after the other along the columns.
            none: what is given to it where there is nothing, an empty tensor.
        """
        x, deviation, weight = (self._x, self._deviation, self._weight) if self.count else (none, none, None)
        x, deviation, weight = gather(x), gather(deviation), gather(none if weight is None else weight)
        if x.numel():
            self._x, self._deviation, self.count = x, deviation, x.shape[1]
            self._weight = weight if weight.numel() else None

    def sums(self) -> list[Tensor]:
        """Sums of all columns and of all deviations, by which NaN is noticed; nothing without columns."""
        return [self._x.sum(), self._deviation.sum()] if self.count else []

    def error(self, change: Tensor, offset: Tensor | None = None) -> Tensor:
        """As `Moments.error`, of these columns."""
        error = self._deviation + self._x @ change.float().transpose(1, 2)
        if offset is not None:
            error -= offset.float().unsqueeze(1)
        return _mean(error.square_(), self._weight)[1].double()

    def power_of(self, rows: Tensor) -> tuple[float, float]:
        """As `Moments.power_of`, of these columns."""
        output = self._x @ rows.float().transpose(1, 2)
        mean = _mean(output, self._weight)[1]
        variance = float(_mean((output - mean.unsqueeze(1)).square_(), self._weight)[1].sum())
        return variance, variance + float(mean.square().sum())


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other along the columns."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _mean(values: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of weights, `(G,)` float64, and the weighted mean of `(G, n, D)` values, `(G, D)`."""
    groups, count, _ = values.shape
    if weight is None:
        total = torch.full((groups,), count, dtype=torch.float64, device=values.device)
        share = values.new_full((groups, 1, count), 1 / count)
    else:
        total = weight.double().sum(1)
        share = (weight.double() / total.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).unsqueeze(1).to(values)
    return total, (share @ values).squeeze(1)


def _blocks(columns: int) -> list[tuple[int, int]]:
    """Runs of columns: a symmetric product is made run by run, each with those before it."""
    size = max(_GRAM_BLOCK, -(-columns // 8))
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]
