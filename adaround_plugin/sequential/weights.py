"""Weights that stay in files of the safetensors format until their turn."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.sequential.stored import FLOATS, Entry, located, named_tensors

__all__ = ["Handle", "StoredWeights", "empty_weights", "is_empty", "like", "put", "stored_weights"]

_META = torch.device("meta")


class Handle(Protocol):
    """Ends what a module was given for a while, such as torch's handle of a hook."""

    def remove(self) -> None:
        """End it; a second time does nothing."""


@contextmanager
def empty_weights() -> Iterator[None]:
    """Modules built inside have their parameters on the device `meta`, without memory; buffers are computed as always.

    It holds for all threads of the process. Tied parameters stay tied.
    """

    def emptied(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to(_META), requires_grad=parameter.requires_grad)

    # torch's annotation forgets that the hook may return another parameter
    handle = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class StoredWeights:
    """What a model has on the device `meta`, in files: mapped into memory, so that reading costs what is looked at.

    Attributes:
        entries: by the name in the model of each tensor on `meta`; where it is.
        device: where tensors go that are read.
        dtype: of floating-point ones; None as they are stored.
    """

    entries: Mapping[str, Entry]
    device: torch.device
    dtype: torch.dtype | None = None

    def dtype_of(self, name: str) -> torch.dtype:
        """What a floating-point tensor is read as."""
        return self.dtype or FLOATS[self.entries[name].dtype]

    def fill(
        self,
        root: nn.Module,
        name: str = "",
        *,
        without: str | None = None,
        dtype: torch.dtype | None = None,
        own: bool = True,
    ) -> dict[str, Tensor]:
        """Put what is on `meta` in a module where it belongs.

        Args:
            root: the model, or a module of it, or a copy.
            name: of `root` in the model.
            without: leave out what stands in this module of the model.
            dtype: of floating-point tensors; None as the object says.
            own: in memory of their own; False may leave them mapped to the file, for as long as that stays as it is.

        Returns:
            What was there, by name in `root`.
        """
        start = f"{name}." if name else ""
        former = {
            inside: tensor
            for inside, tensor in named_tensors(root)
            if tensor.is_meta and (without is None or not f"{start}{inside}".startswith(f"{without}."))
        }
        made: dict[int, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for inside in former:
            by_file.setdefault(self.entries[start + inside].file, []).append(inside)
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as handle:
                for inside in names:
                    if id(former[inside]) not in made:
                        value = handle.get_tensor(self.entries[start + inside].name)
                        kind = (dtype or self.dtype) if value.is_floating_point() else None
                        made[id(former[inside])] = like(former[inside], value.to(self.device, kind, copy=own))
        put(root, {inside: made[id(tensor)] for inside, tensor in former.items()})
        return former

    def lend(self, model: nn.Module, blocks: str, names: Iterable[str]) -> list[Handle]:
        """Let a model run: what is outside of the blocks is there while it runs, each block's weights while that runs.

        Args:
            model: with tensors on `meta`.
            blocks: name of the list of blocks.
            names: of the blocks.

        Returns:
            Handles that end it, also where a call was interrupted.
        """
        loans = [_Loan(self, "", blocks), *(_Loan(self, name) for name in names)]
        handles: list[Handle] = []
        for loan in loans:
            module = model.get_submodule(loan.name)
            handles += [
                module.register_forward_pre_hook(loan.before),
                module.register_forward_hook(loan.behind, always_call=True),
                _Return(loan, module),
            ]
        return handles


@dataclass
class _Loan:
    """Fills a module before it runs and empties it behind; a deep copy of the module takes it along."""

    weights: StoredWeights
    name: str
    without: str | None = None
    former: dict[str, Tensor] = field(default_factory=dict)

    def before(self, module: nn.Module, _: Any) -> None:
        self.former = self.weights.fill(module, self.name, without=self.without, own=False)

    def behind(self, module: nn.Module, _: Any, __: Any) -> None:
        put(module, self.former)
        self.former = {}


@dataclass
class _Return:
    """Ends a loan that an interrupt left: torch runs hooks that are always called behind errors alone."""

    loan: _Loan
    module: nn.Module

    def remove(self) -> None:
        self.loan.behind(self.module, None, None)


def is_empty(module: nn.Module) -> bool:
    """Whether a module has tensors on the device `meta`."""
    return any(tensor.is_meta for _, tensor in named_tensors(module))


def stored_weights(
    model: nn.Module,
    path: str | os.PathLike[str] | None,
    option: str = "weights",
    dtype: torch.dtype | None = None,
) -> StoredWeights | None:
    """The weights of a model that are on the device `meta`, found in files by their headers alone.

    Args:
        model: whose names are those in the files.
        path: a file of the safetensors format, an index of several (`.json`), or a folder with `model.safetensors` or
            `model.safetensors.index.json`; None where nothing is on `meta`.
        option: what the caller's argument is called.
        dtype: what floating-point tensors are read as; None as they are stored.

    Raises:
        InvalidOptionError: as `located` does, or a path is given and nothing is on `meta`.
        InvalidModelError: as `located` does, or no path is given and something is on `meta`.
    """
    if path is None:
        if is_empty(model):
            raise InvalidModelError(
                "model", "has tensors on the device meta", f"Pass {option}=, the folder with their files."
            )
        return None
    if not is_empty(model):
        raise InvalidOptionError(option, "is given, but the model has nothing on the device meta", "Leave it out.")
    real = (tensor.device for _, tensor in named_tensors(model) if not tensor.is_meta)
    return StoredWeights(located(model, path, option), next(real, torch.device("cpu")), dtype)


def like(former: Tensor, value: Tensor) -> Tensor:
    """A value as a parameter, where the former one was."""
    return nn.Parameter(value, former.requires_grad) if isinstance(former, nn.Parameter) else value


def put(root: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module other tensors, by their names in it."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, tensor)
