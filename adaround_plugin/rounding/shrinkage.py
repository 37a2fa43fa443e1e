"""How far a second moment may be trusted: what each sample has to say about it, and how much they differ.

Ledoit and Wolf (2004, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of Multivariate
Analysis 88, section 3) shrink a second moment towards a multiple of the identity by the share of its squared distance
from there that is owed to the choice of samples. The columns of one sample are no draws of their own, so that here the
terms are sums over the columns of each sample. Squared norms come from random projections: for random signs `u` and
`v`, `E (u^T A v)^2 = |A|^2`, the squared Frobenius norm (Hutchinson 1990). Both norms come from the same projections,
which leaves less noise in their ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adaround_plugin.rounding.moments import Moments

__all__ = ["SampleSpread", "three_digits"]

# pairs of random signs, over all groups; and groups, at most
_PAIRS, _MOST_GROUPS = 64, 32
# ridge of a hessian relative to its mean diagonal: for what it has of noise, and its bounds
_DAMPING_PER_NOISE, _LEAST_DAMPING, _MOST_DAMPING = 0.2, 0.01, 10.0
# variance of columns relative to their power, below which it is float32's rounding error of constants
_LEAST_VARIANCE = 1e-12


class SampleSpread:
    """Projections of what each sample adds to a second moment `M = sum w (x - mu)(x - mu)^T`.

    Args:
        groups: number of moments that are shrunk alike.
        columns: length `D` of `x`.
        samples: number of samples.
        device: of `x`.

    Attributes:
        sums: `(samples, taken groups, 3 pairs + 1)` float64: over columns, of the products of both projections, of
            either one, and of the weights.
    """

    def __init__(self, groups: int, columns: int, samples: int, device: torch.device) -> None:
        # evenly spread
        self._groups = slice(None, None, -(-groups // _MOST_GROUPS))
        taken = -(-groups // self._groups.step)
        pairs = -(-_PAIRS // taken)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (2, columns, pairs), generator=generator, device="cpu").float() * 2 - 1
        self._left, self._right = signs.to(device)
        self.sums = torch.zeros(samples, taken, 3 * pairs + 1, dtype=torch.float64, device=device)

    def add(self, x: Tensor, sample: Tensor, weight: Tensor | None = None) -> None:
        """Take in columns.

        Args:
            x: `(G, n, D)`.
            sample: `(n,)` int64, the number of each column's sample.
            weight: `(G, n)`, non-negative; None for 1.
        """
        x = x[self._groups]
        left, right = x @ self._left, x @ self._right
        terms = torch.cat([left * right, left, right, torch.ones_like(left[..., :1])], 2)
        if weight is not None:
            terms *= weight[self._groups].unsqueeze(2)
        self.sums.index_add_(0, sample, terms.transpose(0, 1).double())

    def merge(self, other: SampleSpread) -> None:
        """Take in the columns of another one, of the same samples."""
        self.sums += other.sums

    def shrinkage(
        self,
        trace: Tensor,
        mean: Tensor | None = None,
        add: Callable[..., None] | None = None,
        known: Tensor | None = None,
    ) -> float:
        """The share of the identity in the best mixture with it, from 0 to 1; 1 for less than two samples.

        Args:
            trace: `(G,)` float64, of `M`, of all machines.
            mean: `(G, D)` float64, `mu`; None for 0.
            add: puts the sums over all machines into the tensors that it is given, in place; None for one machine.
            known: `(G,)`, the groups whose `M` is no rounding error; None for those with a trace above 0.
        """
        left, right = self._left.double(), self._right.double()
        product, by_left, by_right, weight = torch.split(self.sums, [*[left.shape[1]] * 3, 1], 2)
        if mean is not None:
            centre_left, centre_right = mean[self._groups] @ left, mean[self._groups] @ right
            product = product - by_left * centre_right - centre_left * by_right + weight * centre_left * centre_right
        count = (weight.amax((1, 2)) > 0).sum().double()
        found, square = product.sum(0), product.square().sum(0)
        if add is not None:
            add(count, found, square)
        level = trace[self._groups].unsqueeze(1) / len(left)
        known = level.squeeze(1) > 0 if known is None else known[self._groups]
        if count < 2 or not known.any():
            return 1.0
        noise = (square - found.square() / count) * count / (count - 1)
        distance = found - level * (left * right).sum(0)
        noise, distance = ((one / level.square())[known].sum() for one in (noise, distance.square()))
        return min(1.0, float(noise / distance)) if distance > 0 else 1.0

    def damping(self, moments: Moments, add: Callable[..., None] | None = None) -> float:
        """The ridge on the hessian `H` of these moments, relative to its mean diagonal `h`.

        It is a fifth of what `H` has of noise, `E |H - E H|^2 / (D h^2)`: `D / n` for `n` samples of one column each,
        whose entries are independent normal numbers; and at least 0.01. Three digits of it are kept, so that it does
        not depend on the order of sums.

        Args:
            moments: of the same columns, finished, and of all machines.
            add: as of `shrinkage`.
        """
        hessian = moments.hessian
        level = hessian.diagonal(dim1=1, dim2=2).mean(1)
        known = level > _LEAST_VARIANCE * moments.power_of_columns.mean(1)
        if not known.any():
            return _LEAST_DAMPING
        shrinkage = self.shrinkage(level * hessian.shape[1] * moments.total, moments.mean, add, known)
        power = torch.linalg.vector_norm(hessian, dim=(1, 2)).square() / (hessian.shape[1] * level.square())
        noise = shrinkage * (float(power[known].mean()) - 1)
        return three_digits(min(_MOST_DAMPING, max(_LEAST_DAMPING, _DAMPING_PER_NOISE * noise)))


def three_digits(value: float) -> float:
    """A finite number without what the order of sums may have left in its last digits."""
    return float(f"{value:.3g}")
