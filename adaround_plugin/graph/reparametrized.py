"""Modules that compute their tensors at each call, by parametrizations or the hooks of torch that came before them."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from adaround_plugin.graph.compat import weight_hooks

__all__ = ["deep_copy", "is_reparametrized", "make_plain"]

M = TypeVar("M", bound=nn.Module)


def is_reparametrized(module: nn.Module) -> bool:
    """Whether a tensor of a module is computed from others, as in weight normalization."""
    return parametrize.is_parametrized(module) or bool(weight_hooks(module))


def make_plain(module: nn.Module) -> None:
    """Let what is computed at each call be a parameter with the same value, in place."""
    if parametrize.is_parametrized(module):
        # torch's own remove_parametrizations changes the class, which copies have in common
        names: Any = module.parametrizations
        values = {name: getattr(module, name).detach() for name in names}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for remove in weight_hooks(module):
        remove()


def deep_copy(module: M) -> M:
    """A deep copy, also of modules that hold what a hook computed with a gradient, which torch does not copy."""
    held = [tensor for one in module.modules() for tensor in vars(one).values() if isinstance(tensor, Tensor)]
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf})
