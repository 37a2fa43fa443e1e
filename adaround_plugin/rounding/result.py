"""What was decided for one weight."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from adaround_plugin.rounding.grid import Grid, same_grid

__all__ = ["LayerRounding", "same_bias"]


@dataclass(frozen=True)
class LayerRounding:
    """The quantized weight of a layer, the correction of its bias, and what both do to its output.

    Attributes:
        grid, integers: the quantized weight; `integers` has the weight's shape.
        bias_correction: `(out,)` float32 to add to the bias, or None.
        learned: False where nearest was kept.
        nearest_error, learned_error: output error relative to the output's variance, on the learning samples; NaN
            where it was not measured.
        nearest_holdout, learned_holdout: the same on held-out samples; None without any.
    """

    grid: Grid
    integers: Tensor
    bias_correction: Tensor | None = None
    learned: bool = False
    nearest_error: float = nan
    learned_error: float = nan
    nearest_holdout: float | None = None
    learned_holdout: float | None = None

    @property
    def weight(self) -> Tensor:
        """The float32 weight that the host makes of it."""
        return self.grid.dequantize(self.integers)

    def stores(self, other: LayerRounding) -> bool:
        """Whether the weight and the bias are those of another rounding on the same grid."""
        same = same_bias(self.bias_correction, other.bias_correction)
        return same and same_grid(self.grid, other.grid) and torch.equal(self.integers, other.integers)

    def corrected(self, bias: Tensor | None) -> Tensor | None:
        """A bias with the correction added; the correction where there is no bias."""
        if self.bias_correction is None:
            return bias
        return self.bias_correction.clone() if bias is None else bias + self.bias_correction


def same_bias(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two biases are equal, or there is none on either side."""
    return one is other or (one is not None and other is not None and torch.equal(one, other))
