"""Streaming second moments of one weighted operator: all that the rounding problem needs to know of the data.

With `x` a column of the float stream, `x^` the same column of the quantized stream and `W` the float weight, the
error of a quantized row `w^` with bias correction `b` is

    E (w x - w^ x^ - b)^2 = E (d + (w - w^) x^ - b)^2,   d = w (x - x^),

so the moments of `x^` and of the *deviation* `d` suffice (equation 25 of the AdaRound paper without its activation
function). Working with `d` rather than with `x` keeps small errors accurate: nothing large is subtracted. The
moments are weighted means over columns; they add over batches, call sites and machines (Chan, Golub and LeVeque 1983).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Moments"]

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
        # small batches are gathered first, so that the (D, D) sums are touched rarely
        self._chunk = max(1024, columns)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._pending_count = 0

    @staticmethod
    def bytes(groups: int, rows: int, columns: int) -> int:
        """Memory that moments of this size take."""
        return 8 * groups * columns * (columns + rows)

    def add(self, x: Tensor, deviation: Tensor, weight: Tensor) -> None:
        """Take in `n` columns.

        Args:
            x: `(G, n, D)`, columns of the quantized stream.
            deviation: `(G, n, R)`, `(x - x^) W^T`.
            weight: `(G, n)`, non-negative column weights.
        """
        if x.shape[1] == 0:
            return
        self._pending.append((x, deviation, weight))
        self._pending_count += x.shape[1]
        if self._pending_count >= self._chunk:
            self.finish()

    def finish(self) -> Moments:
        """Fold pending columns in; the attributes are valid until the next `add`."""
        if not self._pending:
            return self
        parts = zip(*self._pending, strict=True)
        x, deviation, weight = (torch.cat(part, dim=1) if len(part) > 1 else part[0] for part in parts)
        self._pending, self._pending_count = [], 0
        self.count += x.shape[1]
        total = weight.double().sum(1)  # (G,)
        safe = total.clamp_min(torch.finfo(torch.float64).tiny)
        share = (weight.double() / safe[:, None]).unsqueeze(1)  # (G, 1, n)
        mean_x = (share.to(x.dtype) @ x).squeeze(1)
        mean_d = (share.to(x.dtype) @ deviation).squeeze(1)
        x, deviation = x - mean_x.unsqueeze(1), deviation - mean_d.unsqueeze(1)
        # centred a second time: the first mean carries float32's rounding error
        rest_x = (share.to(x.dtype) @ x).squeeze(1)
        rest_d = (share.to(x.dtype) @ deviation).squeeze(1)
        root = weight.sqrt().unsqueeze(-1)
        x = x.sub_(rest_x.unsqueeze(1)).mul_(root)
        deviation = deviation.sub_(rest_d.unsqueeze(1)).mul_(root)
        self._merge(
            total,
            mean_x.double() + rest_x.double(),
            mean_d.double() + rest_d.double(),
            _gram(x),
            (deviation.transpose(1, 2) @ x).double(),
            deviation.double().square().sum(1),
        )
        return self

    def _merge(
        self, total: Tensor, mean_x: Tensor, mean_d: Tensor, hessian: Tensor, cross: Tensor, power: Tensor
    ) -> None:
        """Pool with a chunk given by its mean and its *sums* of centred products."""
        pooled = (self.total + total).clamp_min(torch.finfo(torch.float64).tiny)
        old, new = self.total / pooled, total / pooled  # (G,) shares of the pool
        dx, dd = mean_x - self.mean, mean_d - self.deviation
        between = (old * new)[:, None]
        # pooled mean of products = weighted mean of each + old * new * (difference of means)(...)^T
        self.hessian.mul_(old[:, None, None]).add_(hessian.div_(pooled[:, None, None]))
        self.hessian.baddbmm_((between * dx).unsqueeze(2), dx.unsqueeze(1))
        self.cross.mul_(old[:, None, None]).add_(cross.div_(pooled[:, None, None]))
        self.cross.baddbmm_((between * dd).unsqueeze(2), dx.unsqueeze(1))
        self.power.mul_(old[:, None]).add_(power / pooled[:, None]).add_(between * dd.square())
        self.mean += new[:, None] * dx
        self.deviation += new[:, None] * dd
        self.total += total

    def uncentred(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(E[x^ x^^T], E[d x^^T], E[d^2])`: the moments for a row whose bias must stay as it is."""
        outer = self.mean.unsqueeze(2) * self.mean.unsqueeze(1)
        return (
            self.hessian + outer,
            self.cross + self.deviation.unsqueeze(2) * self.mean.unsqueeze(1),
            self.power + self.deviation.square(),
        )

    def error(self, change: Tensor, correct_bias: bool) -> Tensor:
        """`E (d + (w - w^) x^ - b)^2` per row, with the best `b` if `correct_bias`, else with `b = 0`.

        Args:
            change: `(G, R, D)`, `w - w^`.

        Returns:
            `(G, R)` float64, never negative.
        """
        hessian, cross, power = (self.hessian, self.cross, self.power) if correct_bias else self.uncentred()
        change = change.double()
        # the product in float32 is exact enough, since the sum has no large terms that cancel
        quadratic = ((change.float() @ hessian.float()).double() * change).sum(-1)
        return (power + 2 * (change * cross).sum(-1) + quadratic).clamp_min(0)

    def bias(self, change: Tensor) -> Tensor:
        """The bias correction `E[d] + (w - w^) mu^` that absorbs the mean error, `(G, R)` float64."""
        return self.deviation + (change.double() @ self.mean.unsqueeze(2)).squeeze(2)


def _gram(x: Tensor) -> Tensor:
    """`x^T x` of `(G, n, D)` in float64: blocks on and below the diagonal are computed, the rest is mirrored."""
    columns = x.shape[2]
    block = max(_GRAM_BLOCK, -(-columns // 8))
    if columns <= block:
        return (x.transpose(1, 2) @ x).double()
    product = x.new_empty(x.shape[0], columns, columns, dtype=torch.float64)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        rows = x[:, :, start:stop].transpose(1, 2) @ x[:, :, :stop]
        product[:, start:stop, :stop] = rows
        product[:, :start, start:stop] = rows[:, :, :start].transpose(1, 2)
    return product
