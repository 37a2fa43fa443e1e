"""Files that are written all or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.files import check_path, is_unfinished, write_whole


def test_a_file_is_written_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"first", memoryview(b"second")):
        write_whole(path, content)
        assert path.read_bytes() == bytes(content)
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def full(number: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no room"):
        write_whole(path, b"content")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such call for folders")
def test_content_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "file", []
    sync = os.fsync

    def fsync(number: int) -> None:
        seen.append((os.fstat(number).st_ino, path.exists()))
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(path, b"content")
    assert seen == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_what_a_killed_process_leaves_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def fsync(number: int) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "layer.safetensors", b"content")
    assert [is_unfinished(name) for name in seen] == [True, False]
    assert not is_unfinished("layer.v2.safetensors")


def test_of_two_who_write_at_once_each_writes_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sync, seen = tmp_path / "file", os.fsync, []

    def fsync(number: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        write_whole(path, b"what another process writes")
        seen.append(path.read_bytes())
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(path, b"first")
    assert seen == [b"what another process writes"]
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_take_its_name_is_removed(tmp_path: Path) -> None:
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("value", ["a\0b", b"bytes", 3, None, True])
def test_what_is_no_path_is_refused(value: object) -> None:
    with pytest.raises(InvalidOptionError, match=r"target: .* is not a path"):
        check_path("target", value)


def test_a_path_is_taken_as_text_or_as_an_object(tmp_path: Path) -> None:
    assert check_path("target", str(tmp_path / "file")) == check_path("target", tmp_path / "file") == tmp_path / "file"
    with pytest.raises(InvalidOptionError, match=r"target: .* is a folder"):
        check_path("target", "")
