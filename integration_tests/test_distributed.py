"""Several processes with a shard each: what one process learns from all of it, the same bits in all, and no hanging."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, fx, nn

from adaround_plugin import BlockWise, Finetune, LayerWise, Paper, adaround, get_report, processes
from adaround_plugin.hosts.open import open_host
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.learning import division
from adaround_plugin.learning.passes import Pass
from adaround_plugin.rounding.across import JoinedMoments
from adaround_plugin.sequential.blocks import adaround_blocks
from integration_tests.models import QUICK, batches, prepared_model
from integration_tests.process_groups import GONE, run_group, shard
from integration_tests.pt2e_models import calibrated, exported, x86

DATA = batches(4, 6, 6, sizes=(20, 20, 7, 33, 40, 16))
FISHER = LayerWise(propagate_error=True, correct_bias=True, column_weighting="fisher", damping=0.1, output_hessian=True)


class Net(nn.Module):
    """A residual block with groups between two other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(x + self.b(x))
        return self.head(x.mean((2, 3)))


def prepared(toolkit: str = "fx", bits: int = 3, data: list[Tensor] = DATA, seed: int = 0) -> fx.GraphModule:
    torch.manual_seed(seed)
    model, options = Net().eval(), {"weight_bits": bits, "activation_bits": 8}
    if toolkit == "fx":
        return prepared_model(model, data, **options)
    return calibrated(exported(model, data[0], ({0: torch.export.Dim.DYNAMIC},)), data, x86(**options))


def look(model: fx.GraphModule) -> dict[str, Any]:
    """What was learned: integers about their zero point, scales and biases, and what the report says."""
    report, found = get_report(model), {}
    for node in open_host(model).nodes:
        grid, integers = node.grid, node.nearest.integers
        found[node.name] = (integers - grid.expand(grid.zero_point, integers.shape), grid.scale)
    return {
        "layers": found,
        "state": {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)},
        "errors": (report.output_error, report.nearest_output_error),
        "recipe": report.recipe,
        "trials": [trial.output_error for trial in report.trials],
        "columns": [layer.columns for layer in report.layers],
        "processes": report.processes,
        "text": str(report),
        "recalled": report.recalled,
    }


# what is learned with which options, and how many batches each process has
EXACT: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "default": ("fx", {}, (3, 3)),
    "fisher": ("fx", {"method": FISHER}, (5, 1)),
    "inverse norm, pt2e": ("pt2e", {"method": replace(FISHER, column_weighting="inverse_norm")}, (1, 5)),
}
ON_SAMPLES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "best": (
        "fx",
        {
            "method": BlockWise(layers=replace(QUICK, column_weighting="fisher"), iterations=20),
            "finetune": Finetune(iterations=10, integers=True),
        },
        (4, 2),
    ),
    "paper": ("fx", {"method": Paper(iterations=20, holdout=0.25)}, (2, 4)),
}

# a sample for each process, of which one is held out
SAMPLES = batches(4, 6, 6, sizes=(1, 1))
FEW = {"method": BlockWise(layers=replace(QUICK, column_weighting="fisher"), iterations=3)}


def learned(toolkit: str, call: dict[str, Any], data: list[Tensor], **options: Any) -> dict[str, Any]:
    halves, agreements = JoinedMoments.agreement, list[float]()

    def watched(*arguments: Any, **named: Any) -> float:
        agreements.append(halves(*arguments, **named))
        return agreements[-1]

    with patch.object(JoinedMoments, "agreement", watched):
        found = look(adaround(prepared(toolkit), data, progress=False, **call, **options))
    return {**found, "agreements": agreements}


class Stacked(nn.Module):
    """Blocks that are learned one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


ROWS = batches(6, sizes=(20, 9, 12, 16))


def learned_in_blocks(data: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Integers of every layer."""
    torch.manual_seed(0)
    quantizer = AdaRoundWeightOnlyQuantizer(weight_bits=3)
    model = adaround_blocks(Stacked().eval(), data, "blocks", quantizer, progress=False, **options)
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    return {str(number): layer.weight.qdata for number, layer in enumerate(layers)}


def learn_all(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """What a process of two learns by each method, and from a checkpoint."""
    group = distributed.group.WORLD
    # however small a layer is
    division._FEW = 0
    found = {
        name: learned(toolkit, call, shard(DATA, sizes, rank), process_group=group)
        for name, (toolkit, call, sizes) in {**EXACT, "paper": ON_SAMPLES["paper"]}.items()
    }
    toolkit, call, sizes = ON_SAMPLES["best"]
    # only the folder of the first is used
    for name in ("best", "recalled"):
        place = folder / str(rank)
        found[name] = learned(toolkit, call, shard(DATA, sizes, rank), process_group=group, checkpoint=place)
    found["in blocks"] = learned_in_blocks(shard(ROWS, (1, 3), rank), process_group=group)
    found["few"] = learned("fx", FEW, SAMPLES[rank : rank + 1], process_group=group, memory_budget=0)
    return found


def check_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Two processes have the same bits."""
    assert ours["state"].keys() == theirs["state"].keys()
    for name, value in ours["state"].items():
        assert torch.equal(value, theirs["state"][name]), name
    assert ours["errors"] == theirs["errors"]


def check_like_one(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """The integers of one process, the scales and the errors up to the order of sums."""
    for name, (integers, scale) in alone["layers"].items():
        assert torch.equal(found["layers"][name][0], integers), name
        torch.testing.assert_close(found["layers"][name][1], scale, rtol=1e-5, atol=0)
    for one, other in zip(found["errors"], alone["errors"], strict=True):
        assert abs(one - other) < 1e-4 * other
    for same in ("recipe", "trials", "columns", "agreements"):
        assert found[same] == alone[same], same


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    first, second = run_group(2, tmp_path, learn_all, tmp_path)
    in_blocks = first.pop("in blocks"), second.pop("in blocks"), learned_in_blocks(ROWS)
    for one in in_blocks:
        assert len(one) == 4
        for name, integers in one.items():
            assert torch.equal(integers, in_blocks[0][name]), name
    for name in first:
        check_same(first[name], second[name])
        assert first[name]["processes"] == 2
        assert "2 processes" in first[name]["text"]
    for name, (toolkit, call, _) in EXACT.items():
        check_like_one(first[name], learned(toolkit, call, DATA))
    assert len(first["default"]["trials"]) > 1
    assert all(0 < one < 1 for one in first["default"]["agreements"])
    assert first["default"]["agreements"]
    for name, (toolkit, call, _) in ON_SAMPLES.items():
        # other minibatches, and as good
        assert first[name]["errors"][0] < 1.2 * learned(toolkit, call, DATA)["errors"][0], name
    check_like_one(first["few"], learned("fx", FEW, SAMPLES))
    check_same(first["recalled"], first["best"])
    assert first["best"]["recalled"] == 0
    assert first["recalled"]["recalled"] == second["recalled"]["recalled"] > 3
    assert (tmp_path / "0").exists()
    assert not (tmp_path / "1").exists()


def told(call: Callable[[], Any]) -> str:
    """The error that a call raises, with its type."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def spoiled(data: list[Tensor], value: float) -> list[Tensor]:
    found = [batch.clone() for batch in data]
    found[-1][0, 0, 0, 0] = value
    return found


def fail(rank: int, size: int) -> dict[str, str]:
    """What each of two processes says where one of them is not as the other."""
    world, is_second = distributed.group.WORLD, rank == 1
    data = shard(DATA, (3, 3), rank)

    def learn(model: fx.GraphModule, given: Any = data, group: Any = world, **options: Any) -> Callable[[], Any]:
        return lambda: adaround(model, given, QUICK, progress=False, process_group=group, **options)

    plain = prepared()

    def no_more() -> Any:
        yield data[0]
        raise OSError("the disk is gone")

    calls = {
        "model": learn(prepared(seed=rank)),
        "calibration": learn(prepared(data=DATA[rank : rank + 1])),
        "seed": learn(plain, seed=rank),
        "batch": learn(plain, spoiled(data, float("nan")) if is_second else data),
        "loader": learn(plain, no_more() if is_second else data),
        "overflow": learn(plain, spoiled(data, 3e38) if is_second else data),
        "no group": learn(plain, group=None),
        "another group": learn(plain, group="world"),
    }
    found = {name: told(call) for name, call in calls.items()}
    if not is_second:
        usual, processes._DOOR = processes._DOOR, timedelta(seconds=1)
        found["door"] = told(learn(plain))
        processes._DOOR = usual
    distributed.barrier()
    return {**found, "fine again": told(learn(plain))}


def test_what_one_process_does_wrong_is_told_to_the_other(tmp_path: Path) -> None:
    first, second = run_group(2, tmp_path, fail)
    for said in (first, second):
        assert "rank 1 has other" in said["model"]
        assert "a.weight" in said["model"]
        assert "rank 1 has other quantized network" in said["calibration"]
        assert "rank 1 has other settings (seed) than rank 0" in said["seed"]
        assert said["overflow"].startswith("NonFiniteError: ")
        assert "Pass torch.distributed.group.WORLD if each of them" in said["no group"]
        assert said["another group"].startswith("InvalidOptionError: process_group: 'world' is no group")
        assert said["fine again"] == "no error"
    assert first["door"].startswith(
        "ProcessError: process_group: one of 2 processes is gone, or did not come (at: the door)"
    )
    assert second["batch"].startswith("InvalidBatchError: batch 2: input 'x' holds NaN")
    assert first["batch"].startswith(
        "ProcessError: process_group: rank 1 failed: InvalidBatchError: batch 2: input 'x'"
    )
    assert second["loader"] == "OSError: the disk is gone"
    assert "rank 1 failed: OSError: the disk is gone. Look at its own error" in first["loader"]


class Deadly(LayerWise):
    """Kills the last process when it is to learn."""

    def learn(self, run: Pass) -> None:
        if distributed.get_rank() == distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().learn(run)


def learn_and_die(rank: int, size: int) -> dict[str, Any]:
    """What each of four processes learns, and what it says when the last is killed in the middle of the next call."""
    data, world = shard(DATA, (1, 2, 1, 2), rank), distributed.group.WORLD
    found = {"default": learned("fx", {}, data, process_group=world)}
    start = time.perf_counter()
    deadly = Deadly(**vars(FISHER))
    found["said"] = told(lambda: learned("fx", {"method": deadly}, data, process_group=world))
    found["seconds"] = time.perf_counter() - start
    return found


def test_of_four_processes_three_notice_that_one_is_killed(tmp_path: Path) -> None:
    *left, killed = run_group(4, tmp_path, learn_and_die)
    assert killed == GONE
    for found in left:
        check_same(found["default"], left[0]["default"])
        assert found["said"].startswith("ProcessError: process_group: one of 4 processes is gone")
        assert "with checkpoint= they go on from there" in found["said"]
        assert found["seconds"] < 30
    check_like_one(left[0]["default"], learned("fx", {}, DATA))
