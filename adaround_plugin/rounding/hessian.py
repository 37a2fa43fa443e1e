"""The quadratic form that all rows of a layer share, with the factors that solvers ask of it, each made once."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from adaround_plugin.errors import InvalidOptionError, NonFiniteError

__all__ = ["Hessian"]


class Hessian:
    """A symmetric positive definite matrix per group.

    Args:
        matrix: `(G, D, D)` float64.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        InvalidOptionError: the matrix is not square, or not positive definite.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 3 or matrix.shape[1] != matrix.shape[2]:
            raise InvalidOptionError("hessian", f"has shape {tuple(matrix.shape)}", "Pass shape (groups, D, D).")
        if not torch.isfinite(matrix).all():
            raise NonFiniteError("hessian", "holds NaN or infinity", "Check the calibration data.")
        self.matrix = matrix

    @classmethod
    def damped(cls, moment: Tensor, damping: float, power: Tensor | None = None) -> Hessian:
        """`moment + damping * mean(diagonal) * I`, per group; the identity where the data are constant.

        Constant means that the mean diagonal is below float32's noise, 1e-12 of `power`, `(G,)`: the mean square of
        the data that `moment` was centred from.

        The ridge makes the form definite with fewer samples than columns, and pulls rounding towards the target
        where the data say little.
        """
        mean = moment.diagonal(dim1=1, dim2=2).mean(1)
        noise = torch.zeros_like(mean) if power is None else 1e-12 * power
        ridge = torch.where(mean > noise, damping * mean, torch.ones_like(mean))
        matrix = moment.clone()
        matrix.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
        return cls(matrix)

    def blocks(self, size: int) -> Hessian:
        """The diagonal blocks of `size` columns, each a group of its own: `(G * n, size, size)`.

        A smaller last block is filled up with the identity.
        """
        groups, columns, _ = self.matrix.shape
        missing = -columns % size
        filled = F.pad(self.matrix, (0, missing, 0, missing))
        filled.diagonal(dim1=1, dim2=2)[:, columns:] = 1
        count = (columns + missing) // size
        tiles = filled.reshape(groups, count, size, count, size)
        return Hessian(tiles.diagonal(dim1=1, dim2=3).movedim(3, 1).reshape(groups * count, size, size))

    @cached_property
    def order(self) -> Tensor:
        """`(G, D)`: the columns by falling diagonal, the order in which sequential rounding visits them."""
        return self.matrix.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower factor `L` of `P H P^T = L L^T`, `P` putting the columns in *reverse* visiting order."""
        index = self.order.flip(1)
        columns = self.matrix.shape[1]
        permuted = self.matrix.gather(1, index.unsqueeze(2).expand(-1, -1, columns))
        permuted = permuted.gather(2, index.unsqueeze(1).expand(-1, columns, -1))
        lower, info = torch.linalg.cholesky_ex(permuted)
        if info.any():
            raise InvalidOptionError("damping", "too small: a layer's hessian is not definite", "Raise it.")
        factor: Tensor = lower
        return factor

    @cached_property
    def coupling(self) -> Tensor:
        """`M_jk = H_jk / H_jj` without its diagonal, float32 `(G, D, D)`: what coordinate descent needs."""
        scaled = (self.matrix / self.matrix.diagonal(dim1=1, dim2=2).unsqueeze(2)).float().contiguous()
        scaled.diagonal(dim1=1, dim2=2).zero_()
        return scaled

    @cached_property
    def sequential(self) -> tuple[Tensor, Tensor]:
        """`(M, curvature)` in visiting order, float32, `M` strictly lower triangular: what error feedback needs.

        With `L` as above, reversed, `M_jk = L_kj / L_jj` for `k` visited before `j`, and `curvature_j = L_jj^2`.
        """
        diagonal = self.cholesky.diagonal(dim1=1, dim2=2)
        scaled = (self.cholesky / diagonal.unsqueeze(1)).transpose(1, 2).flip(1, 2).float()
        scaled.diagonal(dim1=1, dim2=2).zero_()
        return scaled.contiguous(), diagonal.square().flip(1).float()

    def solve(self, rows: Tensor) -> Tensor:
        """`rows H^-1` for `(G, R, D)` float64 rows."""
        index = self.order.flip(1).unsqueeze(2).expand(-1, -1, rows.shape[1])
        permuted = rows.transpose(1, 2).gather(1, index)
        solved = torch.cholesky_solve(permuted, self.cholesky)
        return torch.zeros_like(solved).scatter_(1, index, solved).transpose(1, 2)

    def quadratic(self, rows: Tensor) -> Tensor:
        """`r H r^T` for each of `(G, R, D)` float64 rows: `(G, R)`."""
        return ((rows @ self.matrix) * rows).sum(-1)
