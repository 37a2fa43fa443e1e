"""What must hold of a prepared model before work starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from adaround_plugin.errors import InvalidModelError, NonFiniteError
from adaround_plugin.graph.arguments import attribute
from adaround_plugin.graph.compat import Dropout, Normalization, is_observed, is_observer, is_trained, unfused
from adaround_plugin.graph.operators import module_op

__all__ = ["check_prepared_fx", "check_untrained", "check_values", "observed_range"]


def check_prepared_fx(prepared: nn.Module) -> None:
    """Raise unless `prepared` comes from `prepare_fx`, is in eval mode and float32, finite, and calibrated."""
    if not is_observed(prepared):
        raise InvalidModelError(
            "prepared",
            f"{type(prepared).__name__} does not come from prepare_fx or prepare_pt2e",
            "Call the host's prepare step and calibrate first.",
        )
    assert isinstance(prepared, fx.GraphModule)
    check_untrained(prepared)
    # fused containers are born in train mode, which changes nothing: only these modules behave differently
    training = [
        name
        for name, module in prepared.named_modules()
        if module.training and (not name or isinstance(module, Dropout | Normalization))
    ]
    if training:
        raise InvalidModelError(
            f"module {training[0]!r}" if training[0] else "prepared", "is in train mode", "Call .eval() first."
        )
    check_values(prepared, is_observer)


def check_untrained(prepared: fx.GraphModule) -> None:
    """Raise if `prepared` comes from a prepare step for quantization-aware training."""
    if is_trained(prepared):
        raise InvalidModelError(
            "prepared",
            "was prepared for quantization-aware training, which learns weights that round well by itself",
            "Convert it as it is, or prepare the float model with prepare_fx or prepare_pt2e and calibrate.",
        )


def check_values(prepared: nn.Module, is_observer: Callable[[nn.Module], bool]) -> None:
    """Raise unless the parameters are there, float32 and finite, and every observer has seen finite data.

    Complex parameters are none of the host's business unless it is to quantize them.
    """
    for name, value in (*prepared.named_parameters(), *prepared.named_buffers()):
        if value.is_meta:
            raise InvalidModelError(
                f"parameter or buffer {name!r}",
                "lies on the device meta, where there are no values",
                "Load the weights before the model is prepared.",
            )
    for graph in prepared.modules():
        if isinstance(graph, fx.GraphModule):
            _check_real(graph, is_observer)
    for name, parameter in prepared.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise InvalidModelError(
                f"parameter {name!r}", f"is {parameter.dtype}", "Convert the model with .float() before preparing it."
            )
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"parameter {name!r}", "holds NaN or infinity", "Repair the float model.")
    for name, module in prepared.named_modules():
        range_ = observed_range(module) if is_observer(module) else None
        if range_ is None:
            continue
        low, high = range_
        if low.numel() == 0 or bool((low > high).any()):
            raise InvalidModelError(
                f"observer {name!r}", "has seen no data", "Run calibration batches through the prepared model first."
            )
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            source = _observed_node(prepared, name)
            raise NonFiniteError(
                f"activation of {source!r}", "NaN or infinity was observed", "Check the model and the calibration data."
            )


def observed_range(observer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The least and the greatest value that an observer has seen; None of one that keeps no range."""
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    return (low, high) if isinstance(low, Tensor) and isinstance(high, Tensor) else None


def _check_real(graph: fx.GraphModule, is_observer: Callable[[nn.Module], bool]) -> None:
    """Raise if a weight that the host is to quantize is complex."""
    for node in graph.graph.nodes:
        weight = None
        if node.op == "call_module":
            module = unfused(graph.get_submodule(node.target))
            if getattr(module, "qconfig", None) is not None and module_op(module) is not None:
                weight = module.weight
        elif node.op == "get_attr" and any(
            user.op == "call_module" and is_observer(graph.get_submodule(user.target)) for user in node.users
        ):
            weight = attribute(graph, node.target)
        if isinstance(weight, Tensor) and weight.is_complex():
            raise InvalidModelError(
                f"layer {node.target!r}",
                "has complex weights, which the host cannot quantize",
                "Leave it in float: a qconfig of None in FX, no annotation in PT2E.",
            )


def _observed_node(prepared: nn.Module, observer: str) -> str:
    """Name of the node whose output the observer sees."""
    assert isinstance(prepared, fx.GraphModule)
    for node in prepared.graph.nodes:
        if node.op == "call_module" and node.target == observer:
            return str(node.args[0])
    return observer
