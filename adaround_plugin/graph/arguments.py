"""Reading graphs: the arguments of a call, however they were passed, and what a dotted name stands for."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["argument", "attribute", "input_of", "owner_of", "replace_module", "set_argument"]


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or keyword; `default` where it is left out."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def input_of(node: fx.Node) -> Any:
    """The activation that a weighted operator reads: its first argument, which torch calls `input`."""
    return argument(node, 0, "input")


def set_argument(node: fx.Node, index: int, name: str, value: fx.Node) -> None:
    """Give an argument, by position where those before it are."""
    if len(node.args) > index:
        node.update_arg(index, value)
    elif len(node.args) == index:
        node.args = (*node.args, value)
    else:
        node.update_kwarg(name, value)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has what a qualified name stands for, and what it calls it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def attribute(model: nn.Module, name: str) -> Any:
    """The submodule, parameter, buffer or other attribute of a qualified name."""
    return getattr(*owner_of(model, name))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of one, in place, under each of its names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)
