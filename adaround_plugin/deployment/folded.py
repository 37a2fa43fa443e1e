"""Batch norms that a host folded into layers: the float model still has them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from adaround_plugin.digests import digest
from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.compat import Normalization
from adaround_plugin.hosts.open import is_exported
from adaround_plugin.hosts.pt2e.nodes import innermost_module

__all__ = ["check_unfolded"]


def check_unfolded(model: nn.Module, prepared: nn.Module, weights: Mapping[str, str]) -> None:
    """Raise if a layer that is learned took in a batch norm when it was prepared: the model would apply it twice.

    Such a layer is learned from another weight than the model's. A model may be learned once more, from learned
    weights: where no batch norm is missing, they are not compared.

    Args:
        model: the float model that was prepared.
        prepared: what was made of it, learned or not.
        weights: `digest` of the weights that it is learned from, by layer name; of a learned one, its report has them.

    Raises:
        InvalidModelError: a layer did.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    left = _left(prepared)
    if all(name in left for name, module in modules.items() if isinstance(module, Normalization)):
        return
    for name, learned_from in weights.items():
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(weight, Tensor) and digest(weight.detach()) != learned_from:
            raise InvalidModelError(
                f"layer {name!r}",
                "took in a batch norm when it was prepared, and the float model would apply it once more",
                "Fold it into the float model before, by torch.nn.utils.fuse_linear_bn_eval.",
            )


def _left(prepared: nn.Module) -> set[str]:
    """The modules that a prepared graph still calls."""
    assert isinstance(prepared, fx.GraphModule)
    if is_exported(prepared):
        return {innermost_module(node)[0] for node in prepared.graph.nodes if node.op == "call_function"}
    return {str(node.target) for node in prepared.graph.nodes if node.op == "call_module"}
