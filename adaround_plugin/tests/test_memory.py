"""Values kept in memory and in files: what comes back is what was kept, and nothing is left."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph import memory
from adaround_plugin.graph.kept_values import BatchValues, KeptValues
from adaround_plugin.graph.memory import Memory, free_bytes
from adaround_plugin.graph.value_files import Kept

KIB = 1024


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where files go, none of which may be left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


def kinds() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 4, 3, generator=generator)
    per_channel = torch.quantize_per_channel(x, torch.rand(5) + 0.1, torch.arange(5), 1, torch.qint8)
    return [
        ("contiguous", x),
        ("transposed", x.transpose(0, 2)),
        ("channels last", x.contiguous(memory_format=torch.channels_last)),
        ("a part", x[2:5, 1:, ::2]),
        ("expanded", x[:1].expand(4, -1, -1, -1)),
        ("number", torch.tensor(3.5)),
        ("empty", torch.zeros(0, 4)),
        ("bfloat16", x.bfloat16()),
        ("bool", x > 0),
        ("int64", (x * 10).long()),
        ("complex", torch.complex(x, -x)),
        ("quantized", torch.quantize_per_tensor(x, 0.1, 3, torch.quint8)),
        ("quantized part", torch.quantize_per_tensor(x, 0.1, 3, torch.quint8)[1:].transpose(1, 2)),
        ("per channel", per_channel),
    ]


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if not isinstance(one, Tensor):
        assert one == other
        return
    assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    if one.is_quantized:
        assert one.qscheme() == other.qscheme()
        assert torch.equal(one.dequantize(), other.dequantize())
        one, other = one.int_repr(), other.int_repr()
    assert torch.equal(one, other)


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(("name", "value"), kinds(), ids=[name for name, _ in kinds()])
def test_tensors_come_back_as_they_were(name: str, value: Tensor, budget: int | None) -> None:
    with Memory(budget) as memory:
        (kept,) = memory.keep([value])
        assert kept.is_spilled == (budget == 0 and value.numel() > 0)
        kept.read_ahead()
        assert_equal(kept.value, value)
        if kept.is_spilled:
            # the bytes that the value needs, and not all that it is a part of
            assert memory.use.written <= value.numel() * value.element_size() * 4 + 64


def test_structures_come_back_with_what_is_no_tensor() -> None:
    value = {
        "a": [torch.ones(3), 2, "text"],
        "b": (torch.zeros(2, 2), None),
        "c": torch.complex(*torch.ones(2, 4)).conj(),
    }
    with Memory(0) as memory:
        (kept,) = memory.keep([value])
        found = kept.value
        assert found["a"][1:] == [2, "text"]
        assert found["b"][1] is None
        assert torch.equal(found["a"][0], torch.ones(3))
        assert torch.equal(found["c"], value["c"])


def test_what_values_share_is_written_once_and_shared_again() -> None:
    base = torch.arange(1000.0)
    with Memory(0) as memory:
        one, two, three = memory.keep([base[:600], base[400:], (base.reshape(10, 100), 3)])
        assert memory.use.written == -(-4000 // 64) * 64
        assert torch.equal(one.value, base[:600])
        assert torch.equal(two.value, base[400:])
        assert torch.equal(three.value[0], base.reshape(10, 100))


def test_writing_into_what_comes_back_changes_nothing_that_is_kept() -> None:
    with Memory(0) as memory:
        (kept,) = memory.keep([torch.ones(4)])
        kept.value.zero_()
        assert torch.equal(kept.value, torch.ones(4))


def test_memory_is_given_back_with_the_last_value_in_it() -> None:
    x = torch.zeros(KIB // 4)
    with Memory(2 * KIB) as memory:
        one = memory.keep([x, x[10:]])
        assert memory.use.kept == KIB
        two = memory.keep([torch.zeros(KIB // 4)])
        assert memory.keep([torch.zeros(1)])[0].is_spilled
        del one[0]
        assert memory.keep([torch.zeros(1)])[0].is_spilled
        del one[0]
        assert not memory.keep([torch.zeros(1)])[0].is_spilled
        assert not two[0].is_spilled
        assert memory.use.kept == 2 * KIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_of_values_in_files_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where others lie behind what was freed."""
    size, count = 2**20, 200
    monkeypatch.setattr(memory, "_GIVEN_BACK", size)
    # blocks of up to this size come from the heap then
    torch.zeros(16 * size, dtype=torch.uint8)
    values = [torch.ones(size, dtype=torch.uint8) for _ in range(2 * count)]
    kept, process = values[1::2], psutil.Process()
    with Memory(0) as spilling:
        before = process.memory_info().rss
        in_files = [spilling.keep([values[2 * number].clone()]) for number in range(count)]
        values.clear()
        in_files += [spilling.keep([torch.ones(size, dtype=torch.uint8)]) for _ in range(2)]
        assert process.memory_info().rss < before - count * size / 2
        assert len(in_files) == count + 2
    assert all(bool(one.all()) for one in kept)


def test_what_was_freed_is_given_back_at_the_end_of_a_stage_where_memory_is_short(monkeypatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(memory, "_trim", lambda: calls.append(None))
    monkeypatch.setattr(memory, "_GIVEN_BACK_AFTER", KIB)
    with Memory(2 * KIB) as tight, Memory() as ample:
        kept = [one.keep([torch.zeros(KIB // 4)]) for one in (tight, ample)]
        del kept
        for one in (tight, ample):
            one.settle()
        assert not calls  # nothing was written to files
        kept = [tight.keep([torch.zeros(KIB // 4)]), tight.keep([torch.zeros(KIB)])]
        tight.settle()
        assert len(calls) == 1
        tight.settle()
        assert len(calls) == 1
        del kept
        tight.settle()
        assert len(calls) == 2


def test_what_was_freed_is_given_back_amid_a_stage_whose_values_stay_in_memory(monkeypatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(memory, "_trim", lambda: calls.append(None))
    monkeypatch.setattr(memory, "_GIVEN_BACK", 2 * KIB)
    with Memory(2 * KIB) as tight:
        in_file = tight.keep([torch.zeros(KIB)])
        calls.clear()
        for _ in range(6):
            kept = tight.keep([torch.zeros(KIB // 4)])
            assert not kept[0].is_spilled
        assert in_file[0].is_spilled
    # the value before goes when the next is there
    assert len(calls) == 2


def test_a_file_goes_with_its_last_value(folder: Path) -> None:
    with Memory(0) as memory:
        one, two = memory.keep([torch.ones(8), torch.ones(9)])
        (inside,) = folder.iterdir()
        mapped = one.value
        del one
        gc.collect()
        assert len(list(inside.iterdir())) == 1
        del two
        gc.collect()
        assert not list(inside.iterdir())
        # what is in use stays so
        assert torch.equal(mapped, torch.ones(8))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from([0, None]), st.data())
def test_rows_are_those_of_the_parts(lengths: list[int], budget: int | None, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    parts = [torch.randn(length, 3, 2, generator=generator).transpose(1, 2) for length in lengths]
    index = torch.tensor(data.draw(st.lists(st.integers(0, sum(lengths) - 1), max_size=6)), dtype=torch.int64)
    with Memory(budget) as memory:
        rows = memory.keep_rows(parts)
        found = rows.take(index)
        assert torch.equal(found, torch.cat(parts)[index])
        assert found.is_contiguous()


def test_quantized_rows_come_back_in_floats() -> None:
    parts = [torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 3, torch.quint8) for _ in range(2)]
    for budget in (0, None):
        with Memory(budget) as memory:
            found = memory.keep_rows(parts).take(torch.tensor([5, 0]))
            assert torch.equal(found, torch.stack([parts[1].dequantize()[1], parts[0].dequantize()[0]]))


@pytest.mark.parametrize("budget", ["none", -1, 0.5, True, None])
def test_budgets_are_bytes_or_auto(budget: Any) -> None:
    with pytest.raises(InvalidOptionError, match="memory_budget"):
        Memory.of(budget)


def test_auto_is_half_of_what_is_free() -> None:
    budget = Memory.of("auto").budget
    assert budget is not None
    # other processes take and give
    assert 0.3 < budget / free_bytes(torch.device("cpu")) < 0.7


@pytest.mark.parametrize(
    ("limit", "expected"), [("1000000", 1_000_000 - 600_000 + 100_000), ("500000", 0), ("max", None), (None, None)]
)
def test_a_container_has_less(
    limit: str | None, expected: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the files of a container, as Linux shows them
    facts = {"memory.max": limit, "memory.current": "600000", "memory.stat": "anon 1\ninactive_file 100000\n"}
    for name, text in facts.items():
        if text is not None:
            (folder / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", [(folder / "memory.max", folder / "memory.current", "inactive_file")])
    found = free_bytes(torch.device("cpu"))
    assert found == expected if expected is not None else found > 2**24
    for path in folder.iterdir():
        path.unlink()


class Restless(Kept):
    """A value that may be asked for once."""

    is_lasting = False


def nodes(count: int) -> list[fx.Node]:
    graph = fx.Graph()
    return [graph.placeholder(f"x{number}") for number in range(count)]


@pytest.mark.parametrize("budget", [0, None])
def test_batches_are_changed_by_visits_alone(budget: int | None) -> None:
    a, b, c = nodes(3)
    with Memory(budget) as memory:
        given = [KeptValues({a: Restless(torch.full((2,), float(number)))}) for number in range(3)]
        values = BatchValues(memory, [(one, one.copy()) for one in given])
        before = values.copy()
        for number, (exact, quantized) in values.visit([a], [a]):
            exact[b] = exact[a] + 1
            quantized.share(b, exact, b)
            quantized[c] = quantized[a] * 2
            del exact[a]
            if number:
                del quantized[a]
        for number, (exact, quantized) in enumerate(values):
            assert list(exact) == [b]
            assert set(quantized) == ({b, c} if number else {a, b, c})
            assert len(quantized) == len(set(quantized))
            assert torch.equal(exact[b], torch.full((2,), number + 1.0))
            assert torch.equal(quantized[b], exact[b])
            assert torch.equal(quantized[c], torch.full((2,), 2.0 * number))
            del quantized[b]
        assert all(b in quantized for _, quantized in values)
        # what cannot stay where it is was put away with the rest
        assert values[0][1].kept[a].is_lasting
        assert [list(exact) for exact, _ in before] == [[a]] * 3
        again = values.with_quantized_of(before)
        assert [(list(exact), list(quantized)) for exact, quantized in again] == [([b], [a])] * 3


def test_what_is_not_known_is_not_forgotten() -> None:
    a, b = nodes(2)
    values = KeptValues({a: Kept(1)})
    with pytest.raises(KeyError):
        del values[b]
    with pytest.raises(KeyError):
        values[b]
