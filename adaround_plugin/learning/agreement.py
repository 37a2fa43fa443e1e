"""What several processes agree on: one model and one set of options before work starts, and then every decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from adaround_plugin.digests import digest
from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.base import Host
from adaround_plugin.learning.checkpoint import Checkpoint, FolderCheckpoint, Identity, differences, identity
from adaround_plugin.learning.decisions import decode, encode
from adaround_plugin.processes import Processes

__all__ = ["SharedCheckpoint", "open_checkpoint"]

T = TypeVar("T")


class SharedCheckpoint(Checkpoint):
    """All processes take the decisions of the first, so that they end with the same bits.

    Args:
        kept: where the first recalls and keeps decisions.
        keeps: whether it does; known to all.
        processes: that decide together.
        device: where the model of this process lies.
    """

    def __init__(self, kept: Checkpoint, keeps: bool, processes: Processes, device: torch.device) -> None:
        self.recalled = 0
        self._kept, self._keeps, self._processes, self._device = kept, keeps, processes, device
        self._is_making = False

    def has(self, kind: str, name: str) -> bool:
        return self._keeps and self._processes.shared(_place(kind, name), self._kept.has(kind, name))

    def decide(self, kind: str, name: str, whole: type[T], make: Callable[[], T]) -> T:
        if self._is_making:
            return make()
        is_known = self.has(kind, name)
        self.recalled += is_known
        said: tuple[Any, dict[str, Tensor]] = None, {}
        self._is_making = True
        try:
            if self._processes.rank == 0:
                tensors: dict[str, Tensor] = {}
                facts = encode(self._kept.decide(kind, name, whole, make), tensors)
                said = facts, {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
            elif not is_known:
                make()
        finally:
            self._is_making = False
        facts, tensors = self._processes.shared(_place(kind, name), said)
        found: T = decode(facts, tensors, whole, self._device)
        return found


def _place(kind: str, name: str) -> str:
    return f"the decision on {kind} {name!r}"


def open_checkpoint(
    folder: Path | None,
    processes: Processes,
    host: Host,
    arguments: Sequence[list[Any]],
    settings: Mapping[str, object],
    versions: Mapping[str, str],
) -> Checkpoint:
    """Where decisions are kept, by the first of several processes.

    Args:
        folder: None keeps nothing.
        processes: that learn together.
        host, arguments, settings, versions: as of `identity`.

    Raises:
        InvalidOptionError: the processes have other models or settings, the folder belongs to another run, or a
            setting cannot be told from others.
        InvalidModelError: a file in the folder was changed.
    """
    if processes.size == 1 and folder is None:
        return Checkpoint()
    run = identity(host, () if folder is None else arguments, settings, versions)
    if processes.size == 1 and folder is not None:
        return FolderCheckpoint(folder, run)
    devices = {node.weight.device for node in host.nodes}
    if len(devices) > 1:
        shown = ", ".join(sorted(map(str, devices)))
        raise InvalidOptionError(
            "process_group", f"the model of one process lies on {shown}", "Put it on one device in each process."
        )
    everyone = processes.gathered("comparing the models", _alike(run, host, folder is not None))
    for rank, other in enumerate(everyone):
        if others := differences(everyone[0], other):
            raise InvalidOptionError(
                "process_group",
                f"rank {rank} has other {others} than rank 0",
                "Pass the same options, and the same model, calibrated on the same batches, in all processes.",
            )
    parts = processes.gathered("comparing the data", run["data"])
    data = {f"rank {rank}, {name}": text for rank, part in enumerate(parts) for name, text in part.items()}
    kept = Checkpoint()
    if folder is not None and processes.rank == 0:
        kept = FolderCheckpoint(folder, {**run, "data": data})
    return SharedCheckpoint(kept, folder is not None, processes, devices.pop())


def _alike(run: Identity, host: Host, keeps: bool) -> Identity:
    """What all processes must have in common."""
    return {
        **{section: texts for section, texts in run.items() if section not in ("data", "grids")},
        "grids": {node.name: digest(node.grid.scale, node.grid.zero_point) for node in host.nodes},
        "devices": {node.name: node.weight.device.type for node in host.nodes},
        "settings": {**run["settings"], "checkpoint": "kept" if keeps else "none"},
    }
