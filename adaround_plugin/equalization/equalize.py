"""Cross-layer equalization of a float model, before it is prepared.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), section
4.1; the AdaRound paper applies it to MobileNetV2. What is made equal are the ranges of the weights or, for activations
of few bits, those of the activations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from adaround_plugin.equalization.capped_relu import CappedReLU
from adaround_plugin.equalization.channel_ranges import activation_ranges
from adaround_plugin.equalization.channel_scales import Link, balance, level
from adaround_plugin.equalization.homogeneous import cap_of
from adaround_plugin.equalization.layer_pairs import LayerPair, PairFinder
from adaround_plugin.equalization.report import KEY, EqualizationReport, EqualizedPair, difference, spread
from adaround_plugin.equalization.scaled_layers import ScaledLayer
from adaround_plugin.errors import InvalidModelError, InvalidOptionError, NonFiniteError, is_out_of_memory, told_as
from adaround_plugin.graph.arguments import replace_module
from adaround_plugin.graph.compat import is_observed
from adaround_plugin.options import check_alone, check_bool, check_choice, check_integer, check_number

__all__ = ["equalize"]

ReLU6 = Literal["cap", "replace", "keep"]

# largest change of an output relative to its largest magnitude: the same operators, in the same order
_TRACE_TOLERANCE = 1e-5


@torch.no_grad()
def equalize(
    model: nn.Module,
    example_inputs: Sequence[Any],
    *,
    activations: Iterable[Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    relu6: ReLU6 = "cap",
    absorb_bias: bool = False,
    iterations: int = 100,
    tolerance: float = 1e-3,
    limit: float = 100.0,
) -> nn.Module:
    """Scale the channels between two layers so that both have the same weight ranges, channel by channel.

    What the model computes stays the same. A grid per tensor, which has to reach the largest channel, then fits the
    others as well. With `activations`, calibration batches, it is the activations between the layers that get the same
    range in all channels: for activations of few bits, whose grid all channels share while weights have one per
    channel.

    Equalized are pairs of layers (linear, convolutional or transposed, depthwise and grouped too) of which the second
    alone reads the first's output, through ReLU, leaky ReLU, PReLU, ReLU6, dropout, pooling, padding, resizing or
    flattening. Longer chains are pairs that overlap: the sweeps go on until all agree.

    Batch norm stays where it is, and takes the scale of its layer's outputs; ranges are those of the weight that it
    will be folded into by the host. So the result has the class of the model, the names of its modules and the keys of
    its state dict, to which only `relu6` and `absorb_bias` may add.

    ReLU6 needs a choice, because 6 is not scaled with the channel. `"cap"`, the default, is exact: each channel gets a
    cap of its own, in a `CappedReLU` in place of the module. Kernels that clip at 6 do not serve it: where activations
    are quantized, its minimum is taken in float. `"replace"` turns every ReLU6 of the model into ReLU, as the paper
    does: fast, but another function, so look at its float accuracy before you go on. `"keep"` leaves layers with a
    ReLU6 between them alone.

    Args:
        model: float32 or float64, in eval mode, and traceable by `torch.fx`. It is not changed.
        example_inputs: positional arguments of one call, as for `prepare_fx`. They give the shapes.
        activations: calibration batches, as for `adaround`: make the ranges of the activations equal, not those of the
            weights. A range is the magnitude that one activation in a thousand exceeds.
        inputs: maps such a batch to the model's inputs.
        relu6: what becomes of the modules `nn.ReLU6`, and `nn.Hardtanh` from 0. Functional calls are always kept.
        absorb_bias: move constants that a batch norm adds to nearly all activations of a channel into the next layer
            ("Absorbing high biases" in the paper), which makes the ranges of the activations smaller. It changes those
            below three deviations from their mean, if they are normal 0.135 % of them.
        iterations: largest number of sweeps over all pairs.
        tolerance: a sweep that changes no scale by more than this, relatively, is the last. With `activations` one
            sweep does.
        limit: scales are kept within `[1 / limit, limit]`. Without one, a channel with next to no weight would get
            activations that leave no room for those of the other channels.

    Returns:
        The equalized copy. `get_equalization_report` tells what was done; a model without any pair is no error.

    Raises:
        InvalidOptionError: an option is out of range, the model does not run on `example_inputs`, or there are
            `activations` in one of several processes of `torch.distributed`.
        InvalidModelError: in train mode, in half precision, prepared already, or one that cannot be copied, or
            traced so that the trace does the same on `example_inputs`; in float64, with `activations`.
        InvalidBatchError: no batches in `activations`, or one that does not fit the model.
        NonFiniteError: a weight or an activation is NaN or infinite.
    """
    _check_options(relu6, absorb_bias, iterations, tolerance, limit)
    if inputs is not None and activations is None:
        raise InvalidOptionError("inputs", "there are no batches to map", "Pass activations= too.")
    if activations is not None:
        check_alone()
    _check_model(model, (torch.float32, torch.float64) if activations is None else (torch.float32,))
    equalized = _copy(model)
    exact = _run(model, example_inputs)
    if relu6 == "replace":
        _replace_relu6(equalized)
    graph = _trace(equalized)
    shapes = _shapes(equalized, graph, example_inputs)
    pairs, skipped = PairFinder(equalized, graph, shapes, relu6 == "cap").find()
    layers = {pair.first.name: pair.first for pair in pairs} | {pair.second.name: pair.second for pair in pairs}
    order = {name: position for position, name in enumerate(layers)}
    links = [Link(order[pair.first.name], order[pair.second.name], pair.repeat) for pair in pairs]
    magnitudes = [_magnitudes(layer) for layer in layers.values()]
    if activations is None:
        found = balance(magnitudes, links, iterations=iterations, tolerance=tolerance, limit=limit)
    else:
        found = level(magnitudes, links, activation_ranges(equalized, pairs, activations, inputs), limit)
    entries = []
    for pair, scale, before, after in zip(pairs, found.scales, found.before, found.after, strict=True):
        caps = _scale(equalized, pair, scale)
        absorbed, note = _absorb(pair, caps) if absorb_bias else (0, "")
        entries.append(
            EqualizedPair(
                first=pair.first.name,
                second=pair.second.name,
                between=pair.between,
                scales=(float(scale.min()), float(scale.max())),
                before=(spread(before[0]), spread(before[1])),
                after=(spread(after[0]), spread(after[1])),
                absorbed=absorbed,
                note=note,
            )
        )
    change = difference(exact, _run(equalized, example_inputs))
    report = EqualizationReport(entries, skipped, found.iterations, found.converged, change)
    setattr(equalized, KEY, report)
    return equalized


def _check_options(relu6: str, absorb_bias: bool, iterations: int, tolerance: float, limit: float) -> None:
    check_choice("relu6", relu6, get_args(ReLU6))
    check_bool("absorb_bias", absorb_bias)
    check_integer("iterations", iterations, least=1)
    check_number("tolerance", tolerance, least=0)
    # infinity is for no limit
    if limit != math.inf:
        check_number("limit", limit, least=1)


def _check_model(model: nn.Module, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidModelError("model", f"is a {type(model).__name__}, no module", "Pass the float model.")
    if is_observed(model):
        raise InvalidModelError("model", "is prepared already", "Equalize the float model, then prepare it.")
    for name, module in model.named_modules():
        if module.training:
            raise InvalidModelError(f"module {name!r}" if name else "model", "is in train mode", "Call .eval() first.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InvalidModelError(
                f"parameter {name!r}", "lies on the device meta, where there are no values", "Load the weights first."
            )
        if parameter.is_floating_point() and parameter.dtype not in dtypes:
            raise InvalidModelError(
                f"parameter {name!r}", f"is {parameter.dtype}", "Convert the model with .float() before equalizing it."
            )


def _copy(model: nn.Module) -> nn.Module:
    def refused(error: Exception) -> InvalidModelError:
        remedy = "Make computed weights parameters, for example with torch.nn.utils.prune.remove."
        return InvalidModelError("model", f"cannot be copied ({error})", remedy)

    with told_as(refused, RuntimeError):
        return copy.deepcopy(model)


def _trace(model: nn.Module) -> fx.Graph:
    def refused(error: Exception) -> InvalidModelError:
        remedy = "Equalize the submodules that it can trace, and put the results in their places."
        return InvalidModelError("model", f"torch.fx cannot trace it ({error})", remedy)

    with told_as(refused):
        return fx.Tracer().trace(model)


def _run(model: nn.Module, example_inputs: Sequence[Any]) -> Any:
    if not isinstance(example_inputs, tuple | list):
        raise InvalidOptionError(
            "example_inputs", f"is a {type(example_inputs).__name__}", "Pass a tuple of arguments."
        )

    def misfit(error: Exception) -> InvalidOptionError:
        problem = f"the model does not run on them ({error})"
        return InvalidOptionError("example_inputs", problem, "Pass the arguments of one call.")

    with told_as(misfit):
        return model(*copy.deepcopy(tuple(example_inputs)))


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of each tensor."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.found: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = value.shape
        return value


def _shapes(model: nn.Module, graph: fx.Graph, example_inputs: Sequence[Any]) -> dict[fx.Node, torch.Size]:
    """The shape of every node whose value is a tensor.

    Raises:
        InvalidModelError: the trace does not compute what the model does, as where that asks whether an input is None.
    """
    exact, interpreter, problem = _run(model, example_inputs), _Shapes(model, graph), "computes something else"
    try:
        change = difference(exact, interpreter.run(*copy.deepcopy(tuple(example_inputs))))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first = str(error).strip().partition("\n")[0]
        change, problem = math.inf, f"fails ({first})"
    if change > _TRACE_TOLERANCE:
        raise InvalidModelError(
            "model",
            f"{problem} on example_inputs when torch.fx has traced it",
            "Give it one path for all inputs, or equalize the submodules that have one.",
        )
    return interpreter.found


def _replace_relu6(model: nn.Module) -> None:
    """Make ReLU of each ReLU6, in place."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and cap_of(module) is not None:
            model.set_submodule(name, nn.ReLU(inplace=bool(module.inplace)).eval())


def _magnitudes(layer: ScaledLayer) -> Tensor:
    found = layer.magnitudes()
    if not torch.isfinite(found).all():
        raise NonFiniteError(f"layer {layer.name!r}", "its weight holds NaN or infinity", "Repair the float model.")
    return found


def _scale(model: nn.Module, pair: LayerPair, scale: Tensor) -> list[CappedReLU]:
    """Scale the channels of a pair, in place; returns the caps that are now between the layers."""
    pair.first.divide_outputs(scale)
    pair.second.multiply_inputs(scale.repeat_interleave(pair.repeat))
    modules = []
    for cap in pair.caps:
        limits = (cap.limit / scale).repeat_interleave(cap.repeat).to(pair.first.module.weight)
        modules.append(CappedReLU(limits.reshape(-1, *[1] * cap.positions)).eval())
        replace_module(model, model.get_submodule(cap.name), modules[-1])
    return modules


def _absorb(pair: LayerPair, caps: list[CappedReLU]) -> tuple[int, str]:
    """Absorb the high biases of a pair, in place; returns of how many channels, or why of none."""
    constant = pair.first.high_bias()
    if constant is None:
        return 0, f"bias kept: no affine batch norm after {pair.first.name!r}"
    if not pair.is_elementwise:
        return 0, "bias kept: between the layers there is more than an activation function"
    if not pair.second.absorbs:
        return 0, f"bias kept: {pair.second.name!r} pads with zeros"
    # min(x, cap) - c = min(x - c, cap - c): a channel that is always at its cap is a constant
    for module in caps:
        constant = torch.minimum(constant, module.cap.flatten().to(constant))
    for module in caps:
        module.cap -= constant.reshape(module.cap.shape).to(module.cap)
    pair.first.lower_outputs(constant)
    pair.second.absorb_inputs(constant)
    return int((constant > 0).sum()), ""
