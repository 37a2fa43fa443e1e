"""The quadratic form that all rows of a layer share, with the factors that solvers ask of it, each made once."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError, NonFiniteError

__all__ = ["Hessian", "ridge"]


class Hessian:
    """A symmetric positive definite matrix per group, `moment + ridge I`.

    Args:
        moment: `(G, D, D)` float64; it is not copied, and must not change any more.
        ridge: `(G,)` float64, what is added to the diagonal; None for nothing.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        InvalidOptionError: the matrix is not square, or not positive definite.
    """

    def __init__(self, moment: Tensor, ridge: Tensor | None = None) -> None:
        if moment.dim() != 3 or moment.shape[1] != moment.shape[2]:
            raise InvalidOptionError("hessian", f"has shape {tuple(moment.shape)}", "Pass shape (groups, D, D).")
        if not torch.isfinite(moment.sum()):
            raise NonFiniteError("hessian", "holds NaN or infinity", "Check the calibration data.")
        self._moment = moment
        self._ridge = moment.new_zeros(len(moment)) if ridge is None else ridge

    @classmethod
    def damped(cls, moment: Tensor, damping: float, power: Tensor | None = None) -> Hessian:
        """`moment` and its `ridge`, per group; `power` is `(G,)`."""
        return cls(moment, ridge(moment.diagonal(dim1=1, dim2=2), damping, power))

    @property
    def shape(self) -> torch.Size:
        """`(G, D, D)`."""
        return self._moment.shape

    @property
    def matrix(self) -> Tensor:
        """The matrix itself, `(G, D, D)` float64, made anew."""
        matrix = self._moment.clone()
        matrix.diagonal(dim1=1, dim2=2).add_(self._ridge.unsqueeze(1))
        return matrix

    @property
    def diagonal(self) -> Tensor:
        """`(G, D)` float64."""
        return self._moment.diagonal(dim1=1, dim2=2) + self._ridge.unsqueeze(1)

    def of(self, groups: slice) -> Hessian:
        """That of some groups."""
        return self if groups == slice(None) else Hessian(self._moment[groups], self._ridge[groups])

    def blocks(self, size: int) -> Hessian:
        """The diagonal blocks of `size` columns, each a group of its own: `(G * n, size, size)`.

        A smaller last block is filled up with the identity.
        """
        groups, columns, _ = self.shape
        missing = -columns % size
        filled = F.pad(self.matrix, (0, missing, 0, missing))
        filled.diagonal(dim1=1, dim2=2)[:, columns:] = 1
        count = (columns + missing) // size
        tiles = filled.reshape(groups, count, size, count, size)
        return Hessian(tiles.diagonal(dim1=1, dim2=3).movedim(3, 1).reshape(groups * count, size, size))

    @cached_property
    def order(self) -> Tensor:
        """`(G, D)`: the columns by falling diagonal, the order in which sequential rounding visits them."""
        return self.diagonal.argsort(dim=1, descending=True, stable=True)

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower factor `L` of `P H P^T = L L^T`, `P` putting the columns in *reverse* visiting order."""
        index = self.order.flip(1)
        group = torch.arange(len(index), device=index.device)[:, None, None]
        permuted = self._moment[group, index.unsqueeze(2), index.unsqueeze(1)]
        permuted.diagonal(dim1=1, dim2=2).add_(self._ridge.unsqueeze(1))
        lower, info = torch.linalg.cholesky_ex(permuted)
        if info.any():
            raise InvalidOptionError("damping", "too small: a layer's hessian is not definite", "Raise it.")
        factor: Tensor = lower
        return factor

    @cached_property
    def coupling(self) -> Tensor:
        """`M_jk = H_jk / H_jj` without its diagonal, float32 `(G, D, D)`: what coordinate descent needs."""
        # not scaled before it is narrow: a wide copy is twice the memory
        scaled = self._moment.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        scaled.mul_((1 / self.diagonal).float().unsqueeze(2))
        scaled.diagonal(dim1=1, dim2=2).zero_()
        return scaled

    @cached_property
    def sequential(self) -> tuple[Tensor, Tensor]:
        """`(M, curvature)` in visiting order, float32, `M` strictly lower triangular: what error feedback needs.

        With `L` as above, reversed, `M_jk = L_kj / L_jj` for `k` visited before `j`, and `curvature_j = L_jj^2`.
        """
        diagonal = self.cholesky.diagonal(dim1=1, dim2=2)
        scaled = self.cholesky.float().transpose(1, 2).flip(1, 2)
        scaled.mul_((1 / diagonal).float().flip(1).unsqueeze(2))
        scaled.diagonal(dim1=1, dim2=2).zero_()
        return scaled.contiguous(), diagonal.square().flip(1).float().contiguous()

    def solve(self, rows: Tensor) -> Tensor:
        """`rows H^-1` for `(G, R, D)` float64 rows."""
        index = self.order.flip(1).unsqueeze(2).expand(-1, -1, rows.shape[1])
        permuted = rows.transpose(1, 2).gather(1, index)
        solved = torch.cholesky_solve(permuted, self.cholesky)
        return torch.zeros_like(solved).scatter_(1, index, solved).transpose(1, 2)

    def times(self, rows: Tensor) -> Tensor:
        """`rows H` for `(G, R, D)` float64 rows."""
        return rows @ self._moment + self._ridge[:, None, None] * rows

    def roughly_times(self, rows: Tensor) -> Tensor:
        """`rows H` in float32, by the coupling that is there for sweeps: `(G, R, D)`."""
        scaled = rows.float() * self.diagonal.float().unsqueeze(1)
        return torch.baddbmm(scaled, scaled, self.coupling)

    def quadratic(self, rows: Tensor) -> Tensor:
        """`r H r^T` for each of `(G, R, D)` float64 rows: `(G, R)`."""
        return (self.times(rows) * rows).sum(-1)


def ridge(diagonal: Tensor, damping: float, power: Tensor | None = None) -> Tensor:
    """What is added to the diagonal of a moment, `damping` of its mean; 1 where the data are constant.

    It makes the form definite with fewer samples than columns, and pulls rounding towards the target where the data say
    little. Constant means that the mean diagonal is below float32's noise, 1e-12 of the mean square of the data that
    the moment was centred from; or below its smallest normal number, where products are noise too.

    Args:
        diagonal: `(..., D)` float64, of the moment.
        damping: relative to the mean.
        power: `(...,)`, that mean square; None if the moment was not centred.
    """
    mean = diagonal.mean(-1)
    noise = (torch.zeros_like(mean) if power is None else 1e-12 * power).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(mean > noise, damping * mean, 1.0)
