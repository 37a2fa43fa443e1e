"""Files of tensors and facts: they come back, and what is none is refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from adaround_plugin.digests import checksum, digest
from adaround_plugin.errors import InvalidModelError
from adaround_plugin.storage import read_tensors, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7, dtype=torch.int8), "none": torch.zeros(0)}
FACTS = {"name": "é", "numbers": [1, 2.5, None, float("inf")]}


def _written(folder: Path) -> Path:
    path = folder / "file"
    write_tensors(path, "kind", 1, TENSORS, FACTS)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    tensors, facts = read_tensors(_written(tmp_path), "kind", 1, "Again.")
    assert facts == FACTS
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    content = (tmp_path / "file").read_bytes()
    assert _written(tmp_path).read_bytes() == content


def test_tensors_may_share_memory_and_need_not_be_contiguous(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    write_tensors(tmp_path / "file", "kind", 1, {"a": base, "b": base.T}, None)
    tensors, _ = read_tensors(tmp_path / "file", "kind", 1, "Again.")
    assert torch.equal(tensors["b"], base.T)


# what becomes of a file's bytes, and what is said of it
SPOILED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "is cut off, or no file of safetensors"),
    "header cut": (lambda content: content[:30], "is cut off, or no file of safetensors"),
    "payload cut": (lambda content: content[:-1], "is cut off, or no file of safetensors"),
    "longer": (lambda content: content + b"\0", "is cut off, or no file of safetensors"),
    "a text": (lambda content: b"not tensors at all, but words", "is cut off, or no file of safetensors"),
    "a value changed": (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "was changed"),
    "a fact changed": (lambda content: content.replace(b"2.5", b"3.5"), "was changed"),
    "a version changed": (lambda content: content.replace(b'version\\": 1', b'version\\": 2'), "was changed"),
    "other tensors": (lambda content: save(TENSORS), "holds tensors, but is no 'kind'"),
    "another kind": (
        lambda content: content.replace(b'kind\\": \\"kind', b'kind\\": \\"mine'),
        "holds tensors, but is no",
    ),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_is_none_is_refused(spoil: str, tmp_path: Path) -> None:
    path = _written(tmp_path)
    change, said = SPOILED[spoil]
    changed = change(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(InvalidModelError, match=rf"file '.*file': {re.escape(said)}.*\. Again\.$"):
        read_tensors(path, "kind", 1, "Again.")


def test_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"has layout 1 of adaround_plugin .*, not 2"):
        read_tensors(_written(tmp_path), "kind", 2, "Again.")


def test_a_missing_file_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "file", "kind", 1, "Again.")


def test_digests_tell_values_dtypes_shapes_and_order_apart() -> None:
    values = torch.arange(6.0)
    different = [
        (values,),
        (values + 1,),
        (values.double(),),
        (values.view(2, 3),),
        (values.bfloat16(),),
        (values[:0],),
        ("a", "b"),
        ("b", "a"),
        ("ab",),
        (),
    ]
    assert len({checksum(*one) for one in different}) == len(different)
    assert digest(values.view(2, 3).T.T) == digest(values.view(2, 3))
    assert len(digest(values)) == 16
