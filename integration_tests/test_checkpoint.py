"""Checkpoints: a run that was interrupted anywhere goes on, and ends with the same bits as one that was not."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from adaround_plugin import (
    BlockWise,
    Finetune,
    InvalidModelError,
    InvalidOptionError,
    LayerWise,
    Paper,
    adaround,
    get_report,
)
from adaround_plugin.files import write_whole
from adaround_plugin.graph.fingerprint import fingerprint
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning import checkpoint as checkpoints
from adaround_plugin.report import Report
from adaround_plugin.rounding.problem import Rounding, RoundingProblem
from adaround_plugin.solvers import Nearest
from integration_tests.models import QUICK, batches, images, prepared_model
from integration_tests.pt2e_models import Unchanged, calibrated, exported, x86

DATA = batches(4, 6, 6, sizes=(20, 20))


class Net(nn.Module):
    """A residual block of one layer between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(x + self.b(x))
        return self.head(x.mean((2, 3)))


def _prepared(toolkit: str, bits: int = 2, activation_bits: int = 8) -> fx.GraphModule:
    torch.manual_seed(0)
    model, options = Net().eval(), {"weight_bits": bits, "activation_bits": activation_bits}
    if toolkit == "fx":
        return prepared_model(model, DATA, **options)
    return calibrated(exported(model, DATA[0]), DATA, x86(**options))


FISHER = replace(QUICK, column_weighting="fisher", output_hessian=True)
CALLS: dict[str, dict[str, Any]] = {
    "default": {"method": LayerWise(solver="gptq")},
    "blocks": {"method": BlockWise(layers=FISHER, iterations=3)},
    "best": {
        "method": BlockWise(layers=QUICK, iterations=3),
        "finetune": Finetune(iterations=4, integers=True),
    },
    "paper": {"method": Paper(iterations=3, holdout=0.25)},
    "integer biases": {"method": QUICK, "integer_biases": True, "exclude": ["b"]},
}


def learned(prepared: fx.GraphModule, folder: Path | None, **call: Any) -> fx.GraphModule:
    return adaround(prepared, DATA, progress=False, checkpoint=folder, **call)


def told(report: Report) -> dict[str, Any]:
    """A report without times and memory, and without what was recalled."""
    found = vars(report) | {"seconds": None, "memory": None, "recalled": None}
    found["layers"] = [replace(layer, seconds=0.0) for layer in report.layers]
    found["blocks"] = [replace(block, seconds=0.0) for block in report.blocks]
    found["finetuning"] = None if report.finetuning is None else replace(report.finetuning, seconds=0.0)
    return found


def look(model: fx.GraphModule) -> dict[str, Any]:
    """What a learned model says of itself, and what its host makes of it."""
    host = open_host(model)
    grids = {node.name: (node.grid.scale.tolist(), node.grid.zero_point.tolist()) for node in host.nodes}
    return {"report": told(get_report(model)), "grids": grids, "converted": fingerprint(host.quantized_graph)}


class Stop(Exception):  # noqa: N818
    """Not an error."""


def stop_after_one(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> None:
    """Let a run be stopped when it has written a file."""
    plain = checkpoints.write_tensors

    def write(*args: Any) -> None:
        plain(*args)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_tensors", write)
        with pytest.raises(Stop):
            run()


@pytest.mark.parametrize("toolkit", ["fx", "pt2e"])
@pytest.mark.parametrize("name", CALLS)
def test_stopped_at_every_decision_a_run_ends_with_the_same_bits(
    name: str, toolkit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, call = _prepared(toolkit, activation_bits=4 if name == "best" else 8), CALLS[name]
    expected = look(learned(prepared, None, **call))
    whole = learned(prepared, tmp_path / "whole", **call)
    assert look(whole) == expected
    assert get_report(whole).recalled == 0
    decisions = len(list((tmp_path / "whole").iterdir())) - 1
    assert decisions >= len(get_report(whole).layers) + 1
    # each call gets one file further than the one before it
    folder, before = tmp_path / "stopped", Unchanged(prepared)
    for _ in range(decisions + 1):
        stop_after_one(monkeypatch, lambda: learned(prepared, folder, inplace=True, **call))
    before.check()
    resumed = learned(prepared, folder, **call)
    assert look(resumed) == expected
    assert get_report(resumed).recalled == decisions
    assert f"resumed, {decisions} decisions recalled" in str(get_report(resumed))
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_nothing_that_is_recalled_is_solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, call = (
        _prepared("fx", activation_bits=4),
        {**CALLS["best"], "method": BlockWise(layers=FISHER, iterations=3)},
    )
    learned(prepared, tmp_path, **call)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("solved again")

    for place in (
        "layerwise.Layer",
        "blockwise.reconstruct",
        "finetuning.finetune",
        "region_step.Region",
        "column_weights.sensitivities",
    ):
        monkeypatch.setattr(f"adaround_plugin.learning.{place}", refuse)
    learned(prepared, tmp_path, **call)


def _changed_batch() -> list[Tensor]:
    changed = [batch.clone() for batch in DATA]
    changed[1][3, 0, 0, 0] += 1e-6
    return changed


def _changed_weight(prepared: fx.GraphModule) -> fx.GraphModule:
    with torch.no_grad():
        prepared.head.weight[0, 0] += 1e-6
    return prepared


OTHERS: dict[str, tuple[Callable[[], fx.GraphModule], Any, dict[str, Any], str]] = {
    "method": (lambda: _prepared("fx"), DATA, {"method": replace(QUICK, damping=0.2)}, r"settings \(method\)"),
    "seed": (lambda: _prepared("fx"), DATA, {"seed": 1, "exclude": ["b"]}, r"settings \(exclude, seed\)"),
    "data": (lambda: _prepared("fx"), _changed_batch(), {}, r"data \(batch 1\)"),
    "fewer data": (lambda: _prepared("fx"), DATA[:1], {}, r"data \(batch 1, batches\)"),
    "bits": (lambda: _prepared("fx", bits=3), DATA, {}, r"grids \(a, b, head\), quantized network"),
    "weights": (lambda: _changed_weight(_prepared("fx")), DATA, {}, r"network \(head\.weight\)"),
    "toolkit": (lambda: _prepared("pt2e"), DATA, {}, "network"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_folder_of_another_run_is_refused_and_named(other: str, tmp_path: Path) -> None:
    call: dict[str, Any] = {"method": QUICK, "progress": False, "checkpoint": tmp_path}
    adaround(_prepared("fx"), DATA, **call)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make, data, changes, said = OTHERS[other]
    with pytest.raises(InvalidOptionError, match=rf"checkpoint: .* is of a run with other .*{said}"):
        adaround(make(), data, **{**call, **changes})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Own:
    """A solver of a user's, without a text of its own; what Python writes of it is its name."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seen = steps, {"weights": torch.arange(3.0), "steps": [steps]}

    def solve(self, problem: RoundingProblem) -> Rounding:
        return Nearest().solve(problem)


def test_a_solver_of_ones_own_is_told_apart_by_what_it_consists_of(tmp_path: Path) -> None:
    prepared = _prepared("fx")
    learned(prepared, tmp_path, method=replace(QUICK, solver=Own(1)))
    with pytest.raises(InvalidOptionError, match=r"other settings \(method\)"):
        learned(prepared, tmp_path, method=replace(QUICK, solver=Own(2)))
    assert get_report(learned(prepared, tmp_path, method=replace(QUICK, solver=Own(1)))).recalled


def test_a_solver_that_cannot_be_told_apart_is_refused_with_a_checkpoint(tmp_path: Path) -> None:
    prepared, solver = _prepared("fx"), Own(1)
    solver.seen["file"] = threading.Lock()
    with pytest.raises(
        InvalidOptionError, match=r"method: .*cannot be told from another.*Without checkpoint=, in one process"
    ):
        learned(prepared, tmp_path / "folder", method=replace(QUICK, solver=solver))
    assert list(tmp_path.iterdir()) == []
    learned(prepared, None, method=replace(QUICK, solver=solver))


class Silent(Own):
    """A solver that cannot be written out."""

    def __repr__(self) -> str:
        raise ValueError("no text")


def test_a_solver_that_cannot_be_written_out_loses_no_result(tmp_path: Path) -> None:
    report = get_report(learned(_prepared("fx"), tmp_path, method=replace(QUICK, solver=Silent(1))))
    assert report.settings["method"].startswith("LayerWise(solver=Silent, search_scale=")
    assert report.solver == "Silent"


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    prepared = _prepared("fx")
    with pytest.raises(InvalidOptionError, match=r"checkpoint: .* holds other files"):
        learned(prepared, tmp_path, method=QUICK)
    with pytest.raises(InvalidOptionError, match=r"checkpoint: .* is a file"):
        learned(prepared, tmp_path / "mine", method=QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_changed_decision_is_refused_and_a_missing_one_made_again(tmp_path: Path) -> None:
    prepared = _prepared("fx")
    expected = look(learned(prepared, tmp_path, method=QUICK))
    path = next(tmp_path.glob("layer-b-*"))
    content = path.read_bytes()
    for spoiled in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(spoiled)
        with pytest.raises(InvalidModelError, match=r"file '.*layer-b-.*Delete it"):
            learned(prepared, tmp_path, method=QUICK)
    path.write_bytes(next(tmp_path.glob("layer-a-*")).read_bytes())
    with pytest.raises(InvalidModelError, match=r"file '.*layer-b-.*another decision\. Delete it"):
        learned(prepared, tmp_path, method=QUICK)
    path.unlink()
    again = learned(prepared, tmp_path, method=QUICK)
    assert look(again) == expected
    assert get_report(again).recalled == len(list(tmp_path.iterdir())) - 2


def unfinished(path: Path) -> Path:
    """Where a process that is killed while it writes a file leaves what it has."""
    seen: list[Path] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: seen.extend(path.parent.glob(f"{path.name}.*")))
        write_whole(path, b"content")
    path.unlink()
    return seen[0]


def test_what_a_killed_process_left_of_a_file_is_no_obstacle_and_goes(tmp_path: Path) -> None:
    prepared = _prepared("fx")
    folder = tmp_path / "folder"
    folder.mkdir()
    unfinished(folder / "run.safetensors").write_bytes(b"half")
    expected = look(learned(prepared, folder, method=QUICK))
    path = next(folder.glob("layer-b-*"))
    unfinished(path).write_bytes(b"half")
    assert look(learned(prepared, folder, method=QUICK)) == expected
    assert [left.name for left in folder.glob("layer-b-*")] == [path.name]


def test_a_loader_that_shuffles_is_noticed(tmp_path: Path) -> None:
    prepared = _prepared("fx")
    loader = torch.utils.data.DataLoader(
        list(images(40, 4, 6, 6)), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    adaround(prepared, loader, QUICK, progress=False, checkpoint=tmp_path)
    with pytest.raises(InvalidOptionError, match=r"other data \(batch 0, batch 1\)"):
        adaround(copy.deepcopy(prepared), loader, QUICK, progress=False, checkpoint=tmp_path)
