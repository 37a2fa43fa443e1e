"""Observers of torchao's PT2E flow: those of weights and of activations that choose a grid, and the frozen ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx

from adaround_plugin.errors import InvalidModelError, InvalidOptionError, MissingDependencyError
from adaround_plugin.graph.arguments import attribute
from adaround_plugin.hosts.activation_observers import AdaRoundActivationMixin
from adaround_plugin.hosts.weight_observers import AdaRoundWeightMixin, FrozenMixin, check_weight_range
from adaround_plugin.options import check_integer
from adaround_plugin.rounding.grid import Grid

try:
    from torchao.quantization.pt2e import HistogramObserver, UniformQuantizationObserverBase
    from torchao.quantization.pt2e.utils import create_getattr_from_value
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "adaround_plugin.hosts.pt2e",
        f"needs {error.name}, which is not installed",
        "pip install 'adaround_plugin[pt2e]'",
    ) from error

__all__ = [
    "AdaRoundActivationObserver",
    "AdaRoundGroupObserver",
    "AdaRoundObserver",
    "FrozenGroupObserver",
    "FrozenObserver",
    "frozen_observer",
]


class AdaRoundActivationObserver(AdaRoundActivationMixin, HistogramObserver):
    """Activation observer of torchao's PT2E flow for few bits; `get_adaround_x86_inductor_config` makes use of it.

    Its range is the best for the integers from `quant_min` to `quant_max`, by minimum squared error of the values seen.

    Args:
        dtype: storage dtype, `torch.uint8`.
        quant_min, quant_max: the integer range.
        qscheme: `torch.per_tensor_affine`.
        **kwargs: as for torchao's `HistogramObserver`.

    Raises:
        InvalidOptionError: an argument is out of range.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.uint8,
        quant_min: int = 0,
        quant_max: int = 15,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        **kwargs: Any,
    ) -> None:
        if dtype != torch.uint8:
            raise InvalidOptionError("dtype", f"{dtype} does not hold unsigned activations", "Pass torch.uint8.")
        self._check(quant_min, quant_max, qscheme)
        super().__init__(dtype=dtype, qscheme=qscheme, quant_min=quant_min, quant_max=quant_max, **kwargs)


class AdaRoundObserver(AdaRoundWeightMixin, UniformQuantizationObserverBase):
    """Weight observer of torchao's PT2E flow; `get_adaround_weight_spec` puts it into a `QuantizationSpec`.

    It marks a weight for `adaround`, which then also chooses the scale under the layer's own data. Without that pass
    it is a round-to-nearest observer.

    Args:
        dtype: storage dtype, `torch.int8`.
        quant_min, quant_max: the integer range.
        qscheme: per tensor or per channel, symmetric or affine.
        ch_axis: the weight's channel axis: 0, or 1 for transposed convolutions. torchao passes a specification's
            own `ch_axis` on to observers with "PerChannel" in their name only.
        scale: `"mse"`, minimum squared error of the weights (the paper's choice), or `"minmax"`, clipping nothing.
        scale_dtype: scales are rounded to numbers of this dtype, for a host that stores them so.

    Raises:
        InvalidOptionError: an argument is out of range.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.int8,
        quant_min: int = -8,
        quant_max: int = 7,
        qscheme: torch.qscheme = torch.per_channel_symmetric,
        ch_axis: int = 0,
        scale: Literal["mse", "minmax"] = "mse",
        scale_dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> None:
        if dtype != torch.int8:
            raise InvalidOptionError("dtype", f"{dtype} does not hold signed weights", "Pass torch.int8.")
        check_weight_range(quant_min, quant_max)
        super().__init__(dtype=dtype, qscheme=qscheme, quant_min=quant_min, quant_max=quant_max, **kwargs)
        self._configure(ch_axis, scale, scale_dtype)


class FrozenObserver(FrozenMixin, UniformQuantizationObserverBase):
    """The observer that `adaround` leaves behind: reports the learned scale and zero point, whatever it sees."""


class _GroupConversion:
    """What torchao asks observers that write their own operators; the others must not have it."""

    chosen: Callable[[], Grid]

    def convert(self, model: fx.GraphModule, observer_node: fx.Node) -> None:
        """Called by `convert_pt2e`."""
        _convert_groups(self.chosen(), model, observer_node)


def _convert_groups(grid: Grid, model: fx.GraphModule, node: fx.Node) -> None:
    """Put torchao's affine quantize and dequantize operators in the place of an observer of groups.

    Raises:
        InvalidModelError: a row of the weight has no whole number of groups.
    """
    source, size = node.args[0], grid.group_size
    assert isinstance(source, fx.Node)
    assert size is not None
    rows, columns = attribute(model, str(source.target)).shape
    if columns % size:
        raise InvalidModelError(
            f"weight {source.target!r}",
            f"has {columns} columns, no multiple of group_size {size}",
            "Choose a group size that divides them, or one scale per channel for this layer.",
        )
    with model.graph.inserting_before(node):
        scale = create_getattr_from_value(model, model.graph, "_scale", grid.scale.reshape(rows, -1))
        zero_point = create_getattr_from_value(model, model.graph, "_zero_point", grid.zero_point.reshape(rows, -1))
        settings = ((1, size), scale, zero_point, grid.dtype, grid.quant_min, grid.quant_max)
        packed = model.graph.call_function(torch.ops.torchao.quantize_affine, (source, *settings))
        unpacked = model.graph.call_function(torch.ops.torchao.dequantize_affine, (packed, *settings))
    node.replace_all_uses_with(unpacked)
    model.graph.erase_node(node)


class AdaRoundGroupObserver(_GroupConversion, AdaRoundObserver):
    """An `AdaRoundObserver` of a matrix `(out, in)` with one scale per `group_size` entries of a row.

    Converted programs hold torchao's affine operators. torchao's blocks are whole: `group_size` divides `in`.

    Args:
        group_size: entries that share a scale.
        **kwargs: as for `AdaRoundObserver`.

    Raises:
        InvalidOptionError: an argument is out of range.
    """

    def __init__(self, group_size: int = 128, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("group_size", group_size, least=1)
        self.group_size = group_size
        if self.spec.ch_axis != 0:
            raise InvalidOptionError(
                "group_size",
                f"does not go with {self.qscheme} and ch_axis {self.ch_axis}: groups divide the rows of a matrix",
                "Give the specification a per-channel qscheme and ch_axis 0.",
            )

    def forward(self, x: Tensor) -> Tensor:
        """Remember the weight and pass it on."""
        if x.dim() != 2:
            raise InvalidOptionError(
                "group_size",
                f"a weight of shape {tuple(x.shape)} is no matrix",
                "Give convolutions a specification without groups, as AdaRoundWeightOnlyQuantizer does.",
            )
        return super().forward(x)


class FrozenGroupObserver(_GroupConversion, FrozenObserver):
    """The frozen form of `AdaRoundGroupObserver`."""


def frozen_observer(grid: Grid) -> FrozenObserver:
    """The frozen observer of a grid."""
    return FrozenObserver(grid) if grid.group_size is None else FrozenGroupObserver(grid)
