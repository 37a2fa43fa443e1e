"""Peers are judged alike: what goes to a peer and comes back, grids, and a run of this package as one of them."""

from __future__ import annotations

import venv
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from torch import nn

from adaround_plugin import adaround
from integration_tests.benchmarks.accuracy import Case
from integration_tests.benchmarks.peers import ours, run
from integration_tests.benchmarks.peers.exchange import Job, weights_of
from integration_tests.benchmarks.peers.registry import PEERS
from integration_tests.benchmarks.peers.tasks import TASKS, filled, folded, levels


def _normalized() -> nn.Module:
    """A network whose batch norm is not the identity."""
    generator = torch.Generator().manual_seed(0)
    convolution, norm, last = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 3)
    for parameter in (*convolution.parameters(), *last.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=generator)
    for value in (norm.running_mean, norm.running_var, norm.weight):
        assert value is not None
        nn.init.uniform_(value, 0.5, 2.0, generator=generator)
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.Flatten(), last).eval()


def _images(count: int, seed: int) -> torch.Tensor:
    return torch.randn((count, 1, 6, 6), generator=torch.Generator().manual_seed(seed))


class _Small:
    """A task in no time: the score is the agreement with the float network."""

    def network(self) -> nn.Module:
        return folded(_normalized())

    def samples(self, count: int, seed: int) -> list[Any]:
        return list(_images(count, seed).split(16))

    def judge(self, other: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            exact, found = (model(_images(64, 7)) for model in (self.network(), other))
        same = exact.argmax(1) == found.argmax(1)
        return {"score": 100 * float(same.float().mean()), "divergence": float((exact - found).square().mean())}


def test_a_folded_network_is_the_same_function() -> None:
    network = _normalized()
    found = folded(network)
    assert not [module for module in found.modules() if isinstance(module, nn.BatchNorm2d)]
    torch.testing.assert_close(found(_images(8, 1)), network(_images(8, 1)))


@pytest.mark.parametrize(("points", "needed"), [(4, 4), (3, 3), (5, 5)])
def test_levels_are_those_of_the_widest_row(points: int, needed: int) -> None:
    rows = [torch.arange(points) * 0.013 - 0.1, torch.tensor([0.0, 0.0, 1.0] * points)[:points]]
    assert levels(torch.stack(rows), most=8) == needed


def test_uneven_steps_lie_on_no_grid() -> None:
    assert levels(torch.tensor([[0.0, 1.0, 2.5, 3.0]]), most=4) == 5
    # the same values on a finer grid
    assert levels(torch.tensor([[0.0, 1.0, 2.5, 3.0]]), most=8) == 7


def test_weights_come_back_to_the_layers_that_they_are_of() -> None:
    network = folded(_normalized())
    made = {name: (2 * weight, bias) for name, (weight, bias) in weights_of(network).items()}
    other = filled(network, made)
    assert torch.equal(other.get_submodule("4").weight, 2 * network.get_submodule("4").weight)
    with pytest.raises(ValueError, match=r"layers differ.*'4'"):
        filled(network, {"0": made["0"]})


def test_what_is_judged_computes_what_the_converted_model_does() -> None:
    task = _Small()
    job = Job("ours", "default", "small", 3, 64, options={"method": "default", "affine": True})
    made = ours.quantize(job, task.network(), task.samples(64, 1))
    other = filled(task.network(), made)
    case = Case(task.network(), 3, activation_bits=None, affine=True)
    samples = task.samples(64, 1)
    converted = case.convert(adaround(case.prepare(samples), samples, progress=False))
    torch.testing.assert_close(other(_images(8, 7)), converted(_images(8, 7)))
    assert max(levels(weight, 8) for weight, _ in made.values()) <= 8


def test_a_run_in_a_process_of_its_own_leaves_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "small", _Small())
    job = Job("ours", "nearest", "small", 4, 64, options=PEERS["ours"].settings["nearest"])
    row = run.measure(job, Path())
    assert row["on_grid"]
    assert row["score"] > 80
    assert 0 < row["divergence"] < 0.1
    assert row["seconds"] > 0
    assert row["memory"] > row["memory_before"] > 0


def test_what_fails_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "small", _Small())
    job = Job("ours", "wrong", "small", 4, 64, options={"method": "wrong", "affine": False})
    row = run.measure(job, Path())
    assert "wrong" in row["failed"]
    assert "score" not in row


@pytest.mark.parametrize("peer", [name for name, peer in PEERS.items() if peer.requirements])
def test_what_a_script_imports_is_in_its_environment(peer: str) -> None:
    folder = Path(run.__file__).parent
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in (folder / f"{peer}.py", folder / f"{peer}_bits.py")
        if path.exists()
    )
    asked = any(one.startswith("torchvision") for one in PEERS[peer].requirements)
    assert asked or "torchvision" not in text


def test_an_environment_whose_installation_was_cut_off_is_completed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = tmp_path / "tiny_peer-1.5-py3-none-any.whl"
    with ZipFile(wheel, "w") as file:
        file.writestr("tiny_peer.py", "")
        file.writestr("tiny_peer-1.5.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-peer\nVersion: 1.5\n")
        file.writestr("tiny_peer-1.5.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("tiny_peer-1.5.dist-info/RECORD", "")
    monkeypatch.setitem(PEERS, "tiny", replace(PEERS["mct"], requirements=(f"tiny-peer @ {wheel.as_uri()}",)))
    # as far as it got
    venv.create(tmp_path / "environments" / "tiny", with_pip=True)
    assert run.install(tmp_path / "environments", "tiny") == "tiny-peer 1.5"


def test_groups_where_there_are_none_are_a_row_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of channels would be called rows of groups."""
    monkeypatch.setitem(TASKS, "small", _Small())
    job = Job("ours", "nearest", "small", 4, 16, options={"method": "nearest", "affine": False}, group=32)
    with pytest.raises(ValueError, match="one scale for each channel"):
        ours.quantize(job, _Small().network(), _Small().samples(16, 1))


def test_a_search_for_bits_that_fails_says_why() -> None:
    job = Job("ours", "bits", "resnet20", 8, 8, options={"widths": [2, 8], "bytes": 1000.0})
    # this package has no script for it: it is called as a library
    with pytest.raises(RuntimeError, match=r"adaround_plugin fails: .*ours_bits"):
        run.allocate(job, Path())
