"""The host's own conversion of a prepared program, without what it does for quantization-aware training alone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from adaround_plugin.graph.compat import operator_name
from adaround_plugin.hosts.pt2e.compat import forget_models

__all__ = ["converted"]


def converted(prepared: fx.GraphModule) -> fx.GraphModule:
    """What `convert_pt2e(prepared, fold_quantize=False)` returns; it uses the prepared program up.

    In a program with a batch norm, the host looks for the convolutions that `prepare_qat_pt2e` made, and exports their
    96 patterns anew at every conversion, which takes twenty seconds. It is spared that where none can be found.
    """
    norms = [node for node in prepared.graph.nodes if _is_batch_norm(node)]
    hidden = [] if any(_is_trained(norm) for norm in norms) else norms
    operators = {norm.name: norm.target for norm in hidden}
    for norm in hidden:
        norm.target = _aside(norm.target)
    # modules are born with random weights, which must not cost the caller's generator a step
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # the host's own advice; the caller sees it at their own convert
        warnings.simplefilter("ignore")
        try:
            result = convert_pt2e(prepared, fold_quantize=False)
        finally:
            forget_models()
    assert isinstance(result, fx.GraphModule)
    for node in result.graph.nodes:
        node.target = operators.get(node.name, node.target)
    result.recompile()
    return result


def _is_batch_norm(node: fx.Node) -> bool:
    """Whether a node is an operator that the host takes for a batch norm, whatever its overload and backend."""
    return node.op == "call_function" and "batch_norm" in operator_name(node)[0]


def _is_trained(norm: fx.Node) -> bool:
    """Whether a batch norm may be one of `prepare_qat_pt2e`: of a convolution, divided by the scale that its weight was
    multiplied by, perhaps with a bias added."""
    source = _source(norm)
    if _name(source) == "add":
        source = _source(source)
    return _name(source) == "div" and _name(_source(source)).startswith("conv")


def _source(node: fx.Node | None) -> fx.Node | None:
    """The first argument of a node, in front of observers."""
    source = node.args[0] if node is not None and node.args else None
    while isinstance(source, fx.Node) and source.op == "call_module":
        source = source.args[0]
    return source if isinstance(source, fx.Node) else None


def _name(node: fx.Node | None) -> str:
    """The operator's name; empty for what is none."""
    return operator_name(node)[0] if node is not None and node.op == "call_function" else ""


def _aside(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same, and that no pass knows."""

    @functools.wraps(operator)
    def same(*args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)

    return same
