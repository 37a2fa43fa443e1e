"""Where the tensors are that a model lacks, in files of the safetensors format: told from the headers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adaround_plugin.errors import InvalidModelError, InvalidOptionError

__all__ = ["FLOATS", "Entry", "located", "named_tensors"]

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# how many names an error lists
_SHOWN = 4


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, as its header tells it.

    Attributes:
        file: that it is in.
        name: in the file; that of a tied tensor may be another than the model's.
        shape: of it.
        dtype: in the words of the format, such as `"BF16"`.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under each of their names."""
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))


def located(model: nn.Module, path: str | os.PathLike[str], option: str) -> dict[str, Entry]:
    """The entry of each tensor that a model has on the device `meta`, by its name in the model.

    Raises:
        InvalidOptionError: there is no such file, or it is damaged.
        InvalidModelError: the files lack a tensor, hold others, or hold them in other shapes or in a dtype that is not
            read.
    """
    tensors = dict(named_tensors(model))
    missing = {name: tensor for name, tensor in tensors.items() if tensor.is_meta}
    found = _headers(Path(path), option)
    _check_computed(model, missing.keys() - found.keys())
    tied: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    entries = {}
    for name, tensor in missing.items():
        if stored := next((other for other in tied[id(tensor)] if other in found), None):
            entries[name] = found[stored]
    _check_names(tensors, tied.values(), found, missing.keys() - entries.keys(), option)
    return entries


def _headers(path: Path, option: str) -> dict[str, Entry]:
    """What the files hold, by name."""
    if path.is_dir():
        path = next((path / name for name in (_FILE, _INDEX) if (path / name).is_file()), path)
    if not path.is_file():
        raise InvalidOptionError(
            option, f"{str(path)!r} is no file, nor a folder with {_FILE} or {_INDEX}", "Pass one of these."
        )
    files = [path]
    if path.suffix == ".json":
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidOptionError(option, f"{str(path)!r} is no index of shards", "Fetch it again.") from error
        files = [path.with_name(shard) for shard in shards]
    return dict(chain.from_iterable(map(_header, files, [option] * len(files))))


def _header(file: Path, option: str) -> list[tuple[str, Entry]]:
    try:
        with safe_open(file, framework="pt") as handle:
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (it is no mapping)
            return [(name, Entry(file, name, tuple(p.get_shape()), str(p.get_dtype()))) for name, p in parts.items()]
    except (SafetensorError, OSError) as error:
        raise InvalidOptionError(option, f"{str(file)!r} cannot be read ({error})", "Fetch it again.") from error


def _check_computed(model: nn.Module, names: Iterable[str]) -> None:
    """Raise if buffers that no file has, such as a rotary embedding's frequencies, were not computed."""
    persistent = model.state_dict(keep_vars=True).keys()
    if lost := [name for name in names if name not in persistent]:
        raise InvalidModelError(
            "model",
            f"has {_listed(lost)} on the device meta, which models compute themselves and no file has",
            "Build it under empty_weights() in place of torch.device('meta').",
        )


def _check_names(
    tensors: Mapping[str, Tensor],
    tied: Iterable[list[str]],
    found: Mapping[str, Entry],
    missing: Iterable[str],
    option: str,
) -> None:
    """Raise unless names, shapes and kinds of the files are those of the model."""
    both = found.keys() & tensors.keys()
    shapes = [
        f"{name} {found[name].shape} in place of {tuple(tensors[name].shape)}"
        for name in sorted(both)
        if found[name].shape != tuple(tensors[name].shape)
    ]
    kinds = [
        f"{name} as {found[name].dtype}"
        for name in sorted(both)
        if tensors[name].is_meta and tensors[name].is_floating_point() != (found[name].dtype in FLOATS)
    ]
    twice = [" and ".join(names) for names in tied if len(found.keys() & set(names)) > 1]
    problems = {
        "lack": sorted(missing),
        "hold what the model has not:": sorted(found.keys() - tensors.keys()),
        "hold": shapes,
        "hold in a format that is not read": kinds,
        "hold both of what is tied in the model:": twice,
    }
    said = [f"{what} {_listed(names)}" for what, names in problems.items() if names]
    if said:
        raise InvalidModelError(
            option, f"the files {'; they '.join(said)}", "Build the model of the configuration that lies beside them."
        )


def _listed(names: Iterable[str]) -> str:
    some = list(names)
    more = f" and {len(some) - _SHOWN} more" if len(some) > _SHOWN else ""
    return ", ".join(some[:_SHOWN]) + more
