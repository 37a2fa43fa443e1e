"""What a width leaves of a weight: rounded to nearest, and as the default rounds it with a cheap solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.learning.layer import Layer, Recipe
from adaround_plugin.rounding.across import shape_of_sets
from adaround_plugin.rounding.grid import GridSpec, integer_range, is_symmetric_by_default
from adaround_plugin.rounding.moments import HeldOut, Moments
from adaround_plugin.rounding.ranges import min_mse_grid
from adaround_plugin.rounding.result import LayerRounding
from adaround_plugin.solvers import GPTQ

__all__ = ["Candidate", "Scheme", "candidates", "grid_spec"]

# "observed": zero point as each layer's observer has it; None: what is more accurate at each width
Scheme = bool | Literal["observed"] | None


@dataclass(frozen=True)
class Candidate:
    """A layer at one width; integers are stored in int8.

    Attributes:
        bits: the width.
        nearest: rounded to nearest on the grid of least squared error of the weights, bias as it is.
        learned: by GPTQ on the second moments of the layer's input, with the scale searched there, and as the default
            does: columns weighed by what they do to the network's output, rows that make up for each other.
    """

    bits: int
    nearest: LayerRounding
    learned: LayerRounding


def grid_spec(node: WeightedNode, bits: int, symmetric: Scheme) -> GridSpec:
    """The grid of a layer at another width."""
    grid = node.grid
    low, high = integer_range(bits)
    if symmetric == "observed":
        symmetric = grid.symmetric
    elif symmetric is None:
        symmetric = is_symmetric_by_default(bits)
    return GridSpec(
        low, high, grid.ch_axis, symmetric, grid.dtype, group_size=grid.group_size, scale_dtype=grid.scale_dtype
    )


def candidates(
    node: WeightedNode,
    moments: Moments,
    widths: Sequence[int],
    symmetric: Scheme,
    damping: float,
    outputs: Tensor | None,
) -> list[Candidate]:
    """A layer at each width.

    Args:
        node: the layer.
        moments: of its input.
        widths: in bits.
        symmetric: of the grids.
        damping: ridge on the second moments, relative to their mean diagonal.
        outputs: of `ColumnWeights`, where rows are to make up for each other. Channels of a depthwise convolution stay
            apart.
    """
    if shape_of_sets(*node.op.rows(node.weight).shape) is not None:
        # groups of one row would need moments of all of them together
        outputs = None
    recipe = Recipe(propagate_error=False, correct_bias=node.bias != "fixed", damping=damping, output_hessian=True)
    found = []
    for bits in widths:
        grid = min_mse_grid(node.weight, grid_spec(node, bits, symmetric))
        nearest = LayerRounding(grid, grid.nearest(node.weight))
        layer = Layer(node.op, node.weight, grid, moments, HeldOut(), outputs)
        learned = layer.learn(recipe, GPTQ(), search_scale=True, is_judged=False)
        found.append(Candidate(bits, _narrow(nearest), _narrow(learned)))
    return found


def _narrow(rounding: LayerRounding) -> LayerRounding:
    return replace(rounding, integers=rounding.integers.to(torch.int8))
