"""Tensors and facts in one file of the safetensors format, which says what it is and whether it is whole.

Nothing is pickled. The file's metadata have one entry, `adaround_plugin`, a JSON object: the facts, the kind of file,
the version of its layout and of this package, and a checksum of everything. (Of several entries the order would be
chance, and the same content would not be the same bytes.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adaround_plugin._version import __version__
from adaround_plugin.digests import checksum
from adaround_plugin.errors import InvalidModelError
from adaround_plugin.files import write_whole

__all__ = ["read_tensors", "write_tensors"]

# bytes of the number that says how long the header is
_PREFIX = 8
_ENTRY = "adaround_plugin"


def write_tensors(path: Path, kind: str, version: int, tensors: Mapping[str, Tensor], facts: Any) -> None:
    """Write a file as a whole, or leave what was there.

    Args:
        path: of the file.
        kind: what the file is, for example `"adaround_plugin rounding"`.
        version: of its layout.
        tensors: by name, on any device.
        facts: what JSON can hold.
    """
    # copies: tensors of a file share no memory
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    described = {"kind": kind, "version": version, "package": __version__, "facts": facts}
    entry = json.dumps({**described, "checksum": _checksum(described, held)})
    write_whole(path, save(held, {_ENTRY: entry}))


def read_tensors(path: Path, kind: str, version: int, remedy: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors (on the CPU) and the facts of a file that `write_tensors` wrote.

    Args:
        path, kind, version: as there.
        remedy: what to do about a file that is none.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidModelError: the file is cut off, was changed, is of another kind, or has a layout of another version.
    """
    subject, content = f"file {str(path)!r}", path.read_bytes()
    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:
        raise InvalidModelError(subject, f"is cut off, or no file of safetensors ({error})", remedy) from error
    end = _PREFIX + int.from_bytes(content[:_PREFIX], "little")
    metadata = json.loads(content[_PREFIX:end]).get("__metadata__") or {}
    described = json.loads(metadata.get(_ENTRY, "{}"))
    if described.get("kind") != kind:
        raise InvalidModelError(subject, f"holds tensors, but is no {kind!r}", remedy)
    if described.pop("checksum", None) != _checksum(described, tensors):
        raise InvalidModelError(subject, "was changed: its checksum is another", remedy)
    if described["version"] != version:
        raise InvalidModelError(
            subject,
            f"has layout {described['version']} of adaround_plugin {described['package']}, not {version}",
            "Read it with that version of the package.",
        )
    return tensors, described["facts"]


def _checksum(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    parts = (part for name in sorted(tensors) for part in (name, tensors[name]))
    return checksum(json.dumps(described, sort_keys=True), *parts)
