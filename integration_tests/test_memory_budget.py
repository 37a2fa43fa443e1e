"""A memory budget: the same bits whatever it is, files that are gone afterwards, and loaders that are read again."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from adaround_plugin import BlockWise, Finetune, LayerWise, adaround, get_report, save_rounding
from adaround_plugin.errors import InvalidBatchError, InvalidOptionError, NonFiniteError
from adaround_plugin.learning.passes import Pass
from adaround_plugin.regions import batches
from integration_tests.pairs import pairwise
from integration_tests.region_models import prepared_by, seeded
from integration_tests.test_comparison import samples

HOSTS = ("fx", "pt2e")
DATA = samples(64, 16)
_FISHER = LayerWise(column_weighting="fisher")
CALLS: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {"method": BlockWise(layers=_FISHER, iterations=20), "finetune": Finetune(iterations=20, integers=True)},
}


class Net(nn.Module):
    """A stem, a residual block with a depthwise branch, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.short, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        first, second = torch.relu(self.a(x)).chunk(2, 1)
        x = torch.relu(self.b(torch.cat([second, first], 1)) + self.short(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def reads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading is always fast enough."""
    monkeypatch.setattr(batches, "_CHEAP", 1e9)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def prepared(host: str, activation_bits: int | None = 8) -> fx.GraphModule:
    return prepared_by(host, activation_bits, seeded(Net), DATA, 3)


def bits_of(model: fx.GraphModule, path: Path) -> dict[str, Tensor]:
    """All that was learned."""
    save_rounding(model, path)
    return load_file(path)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class Loader:
    """Batches made anew each time."""

    def __init__(self) -> None:
        self.reads = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.reads += 1
        for batch in DATA:
            yield batch.clone()


class SlowLoader(Loader):
    """Takes longer than any disk."""

    def __iter__(self) -> Iterator[Tensor]:
        for batch in super().__iter__():
            time.sleep(0.05)
            yield batch


@pytest.mark.parametrize(("host", "activation_bits", "call"), pairwise(HOSTS, [None, 8], list(CALLS)))
def test_the_result_does_not_depend_on_it(
    host: str, activation_bits: int | None, call: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, out = prepared(host, activation_bits), tmp_path_factory.mktemp("out")
    inside = adaround(model, Loader(), **CALLS[call], progress=False, memory_budget=2**30)
    outside = adaround(model, Loader(), **CALLS[call], progress=False, memory_budget=0)
    assert_same(bits_of(inside, out / "inside"), bits_of(outside, out / "outside"))
    assert get_report(inside).output_error == get_report(outside).output_error
    use = get_report(inside).memory
    assert use["spilled"] == use["written"] == 0 < use["kept"] <= use["budget"] == 2**30
    use = get_report(outside).memory
    assert use["kept"] == use["budget"] == 0 < use["spilled"] < use["written"]
    assert not list(folder.iterdir())


class Shrinking(nn.Module):
    """What comes before the first layer is the same in both networks, and larger than what comes behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 2, 3, 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(torch.tanh(x.repeat(1, 1, 3, 3)))).mean((2, 3)))


@pytest.mark.parametrize("host", HOSTS)
def test_what_both_networks_have_in_common_is_kept_once(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared_by(host, None, seeded(Shrinking), DATA)
    most = []
    for share in (Pass._share, lambda plan, values: None):
        monkeypatch.setattr(Pass, "_share", staticmethod(share))
        report = get_report(adaround(model, DATA, _FISHER, progress=False))
        most.append(report.memory["kept"])
    assert most[0] < 0.6 * most[1]


def test_a_part_may_stay_in_memory(tmp_path: Path) -> None:
    model = prepared("fx")
    whole = adaround(model, Loader(), progress=False)
    most = get_report(whole).memory["kept"]
    some = adaround(model, Loader(), progress=False, memory_budget=most // 2)
    use = get_report(some).memory
    assert 0 < use["spilled"] < most
    assert most // 4 < use["kept"] <= most // 2
    assert_same(bits_of(whole, tmp_path / "whole"), bits_of(some, tmp_path / "some"))


def test_a_list_of_batches_stays_where_it_is() -> None:
    memory = get_report(adaround(prepared("fx"), DATA, "nearest", progress=False, memory_budget=0)).memory
    loaded = get_report(adaround(prepared("fx"), iter(DATA), "nearest", progress=False, memory_budget=0)).memory
    assert loaded["written"] - memory["written"] == sum(batch.nbytes for batch in DATA)


def test_files_are_gone_after_an_error_and_an_interrupt(folder: Path) -> None:
    model = prepared("fx", None)
    spoiled = [*DATA[:-1], DATA[-1].clamp(-3, 3) * 1e38]
    with pytest.raises(NonFiniteError):
        adaround(model, spoiled, progress=False, memory_budget=0)
    assert not list(folder.iterdir())

    class Interrupted(Loader):
        def __iter__(self) -> Iterator[Tensor]:
            yield from DATA
            assert list(folder.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adaround(model, Interrupted(), progress=False, memory_budget=0)
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("reads_again")
@pytest.mark.parametrize("call", CALLS)
def test_batches_read_again_are_the_same(call: str, tmp_path: Path) -> None:
    model, loader = prepared("fx"), Loader()
    again = adaround(model, loader, **CALLS[call], progress=False, memory_budget=0)
    assert loader.reads > 2
    assert_same(
        bits_of(again, tmp_path / "again"),
        bits_of(adaround(model, DATA, **CALLS[call], progress=False), tmp_path / "list"),
    )


def test_a_slow_loader_is_read_once() -> None:
    loader = SlowLoader()
    adaround(prepared("fx"), loader, "nearest", progress=False, memory_budget=0)
    assert loader.reads == 1


def test_one_shot_iterators_are_kept(tmp_path: Path) -> None:
    model = prepared("pt2e")
    once = adaround(model, iter(DATA), progress=False, memory_budget=0)
    assert_same(bits_of(once, tmp_path / "once"), bits_of(adaround(model, DATA, progress=False), tmp_path / "list"))


@pytest.mark.usefixtures("reads_again")
def test_a_loader_that_shuffles_is_noticed_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.cat(DATA)), batch_size=16, shuffle=True)
    model = adaround(prepared("fx"), loader, "nearest", inputs=lambda batch: batch[0], progress=False, memory_budget=0)
    assert get_report(model).memory["written"] > 0
    assert "others each time" in caplog.text


@pytest.mark.usefixtures("reads_again")
def test_another_batch_in_the_place_of_one_is_named() -> None:
    class Changing(Loader):
        def __iter__(self) -> Iterator[Tensor]:
            for number, batch in enumerate(super().__iter__()):
                yield batch + (number == 2 and self.reads > 2)

    with pytest.raises(InvalidBatchError, match=r"batch 2: is another one than .* neither shuffles nor augments"):
        adaround(prepared("fx"), Changing(), "nearest", progress=False, memory_budget=0)


@pytest.mark.usefixtures("reads_again")
def test_batches_that_are_missing_the_second_time_are_named() -> None:
    class Shrinking(Loader):
        def __iter__(self) -> Iterator[Tensor]:
            for number, batch in enumerate(super().__iter__()):
                if number < 3 or self.reads < 3:
                    yield batch

    with pytest.raises(InvalidBatchError, match="batch 3: is missing: the data had 3 batches"):
        adaround(prepared("fx"), Shrinking(), "nearest", progress=False, memory_budget=0)


def test_a_disk_without_room_is_named(folder: Path) -> None:
    model = prepared("fx")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InvalidOptionError, match=r"memory_budget: .*TMPDIR"):
            adaround(model, iter(DATA), progress=False, memory_budget=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("budget", ["all", -1, 1.5, None, True])
def test_other_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(InvalidOptionError, match="memory_budget"):
        adaround(prepared("fx"), DATA, progress=False, memory_budget=budget)
