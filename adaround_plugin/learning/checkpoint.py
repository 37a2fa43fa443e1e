"""Decisions kept in a folder as they are made, so that a run which was interrupted can go on.

A decision is what takes time and what the rest depends on: the recipe, the rounding of a layer, what was learned of a
block or of the whole network, the comparison with nearest. Everything else is run again. Each decision is a file of
its own, written under another name first, so that whatever kills a process leaves whole decisions alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from adaround_plugin.digests import digest
from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.files import is_unfinished
from adaround_plugin.graph.fingerprint import differing, fingerprint
from adaround_plugin.hosts.base import Host
from adaround_plugin.learning.decisions import decode, encode
from adaround_plugin.learning.settings import state_of, written_out
from adaround_plugin.regions.batches import batch_digest
from adaround_plugin.storage import read_tensors, write_tensors

__all__ = ["Checkpoint", "FolderCheckpoint", "Identity", "differences", "identity"]

T = TypeVar("T")

_RUN, _DECISION, _VERSION = "adaround_plugin run", "adaround_plugin decision", 1
_RUN_FILE, _ENDING = "run.safetensors", ".safetensors"
_OTHER_FOLDER = "Pass another folder, or what was passed when it was made."
_DELETE = "Delete it: what it held is decided again."
# so many letters of a name stand in that of a file, and so many names in an error
_LETTERS, _SHOWN = 60, 3

# what tells a run from others: texts by section and name
Identity = Mapping[str, Mapping[str, str]]


class Checkpoint:
    """Keeps nothing: every decision is made.

    Attributes:
        recalled: how many decisions were not made but recalled.
    """

    recalled = 0

    def has(self, kind: str, name: str) -> bool:
        """Whether a decision can be recalled."""
        return False

    def decide(self, kind: str, name: str, whole: type[T], make: Callable[[], T]) -> T:
        """Recall a decision, or make it and keep it; one that is made for the sake of another is not kept by itself.

        Args:
            kind, name: tell it from all others of a run.
            whole: a dataclass, of what `decisions` can encode.
            make: makes it.
        """
        return make()


class FolderCheckpoint(Checkpoint):
    """Keeps decisions in a folder.

    Args:
        folder: is made where it does not exist.
        identity: of the run: a folder of another one is refused.

    Raises:
        InvalidOptionError: the folder belongs to another run, or holds other files.
        InvalidModelError: a file in it was changed.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.recalled = 0
        self._folder = folder
        self._run = digest(json.dumps(identity, sort_keys=True))
        self._asked: set[Path] = set()
        self._is_making = False
        known = folder / _RUN_FILE
        if known.exists():
            _, before = read_tensors(known, _RUN, _VERSION, _OTHER_FOLDER)
            if others := differences(before, identity):
                raise InvalidOptionError(
                    "checkpoint", f"{str(folder)!r} is of a run with other {others}", _OTHER_FOLDER
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        if any(not is_unfinished(path.name) for path in folder.iterdir()):
            raise InvalidOptionError("checkpoint", f"{str(folder)!r} holds other files", "Pass an empty folder.")
        write_tensors(known, _RUN, _VERSION, {}, identity)

    def has(self, kind: str, name: str) -> bool:
        return self._path(kind, name).exists()

    def decide(self, kind: str, name: str, whole: type[T], make: Callable[[], T]) -> T:
        if self._is_making:
            return make()
        path, key = self._path(kind, name), {"run": self._run, "kind": kind, "name": name}
        assert path not in self._asked, f"{kind} {name!r} is decided twice"
        self._asked.add(path)
        if path.exists():
            held, facts = read_tensors(path, _DECISION, _VERSION, _DELETE)
            if {one: facts[one] for one in key} != key:
                raise InvalidModelError(f"file {str(path)!r}", "is of another run, or another decision", _DELETE)
            self.recalled += 1
            found: T = decode(facts["value"], held, whole)
            return found
        self._is_making = True
        try:
            made = make()
        finally:
            self._is_making = False
        tensors: dict[str, Tensor] = {}
        value = encode(made, tensors)
        write_tensors(path, _DECISION, _VERSION, tensors, {**key, "value": value})
        for left in self._folder.iterdir():
            if is_unfinished(left.name) and left.name.startswith(path.name):
                left.unlink(missing_ok=True)
        return made

    def _path(self, kind: str, name: str) -> Path:
        readable = re.sub(r"[^\w.-]+", "_", name)[:_LETTERS]
        return self._folder / f"{kind}-{readable}-{digest(kind, name)}{_ENDING}"


def identity(
    host: Host, arguments: Sequence[list[Any]], settings: Mapping[str, object], versions: Mapping[str, str]
) -> Identity:
    """What tells a run from others: settings, versions, both graphs with all weights, and every batch.

    Args:
        host: of the network.
        arguments: of each batch, as the host's graphs take them.
        settings, versions: by name.

    Raises:
        InvalidOptionError: a setting cannot be told from others.
    """
    graphs = {"network": host.float_graph, "quantized network": host.quantized_graph}
    return {
        # in words and as a whole: what is written out of an object of the user's may be no more than its type
        "settings": {name: f"{text} {state_of(name, settings[name])}" for name, text in written_out(settings).items()},
        "versions": versions,
        **{section: fingerprint(graph) for section, graph in graphs.items()},
        "grids": {
            node.name: digest(node.grid.scale, node.grid.zero_point, str(node.weight.device)) for node in host.nodes
        },
        "data": {"batches": str(len(arguments))}
        | {f"batch {number}": batch_digest(of_batch) for number, of_batch in enumerate(arguments)},
    }


def differences(before: Identity, now: Identity) -> str:
    """What differs between two runs, in words."""
    found = []
    for section in sorted(before.keys() | now.keys()):
        names = differing(before.get(section, {}), now.get(section, {}))
        if names:
            left = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            found.append(f"{section} ({', '.join(names[:_SHOWN])}{left})")
    return ", ".join(found)
