"""The benchmarks' networks and data work, and a small run of them shows what the large ones measure."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from adaround_plugin import METHODS, LayerWise, adaround, get_report
from adaround_plugin.learning.methods import Preset
from adaround_plugin.report import LayerReport, Report
from integration_tests import mutations
from integration_tests.benchmarks import glyphs, integers, model_zoo, networks, server_paths, servers
from integration_tests.benchmarks.accuracy import Case, accuracy, preset_of
from integration_tests.models import RECIPE


def test_two_bits_keep_the_accuracy_that_nearest_loses() -> None:
    network = networks.load("vit")
    images, labels = (part[:1000] for part in glyphs.load("test", 1000))
    calibration, _ = glyphs.load("train", 64, seed=1)
    batches = list(calibration.split(32))
    case = Case(network, bits=2, activation_bits=None)
    prepared = case.prepare(batches)
    # one recipe: the trials of "auto" are tested on their own
    score = {}
    for method in ("nearest", LayerWise(**RECIPE)):
        learned = adaround(prepared, batches, method, progress=False)
        score[get_report(learned).method] = accuracy(case.convert(learned), images, labels)
    exact = accuracy(network, images, labels)
    assert exact > 85
    assert score["LayerWise"] > exact - 5
    assert score["nearest"] < exact - 30


def test_a_name_stands_for_a_method_or_a_solver_of_layers() -> None:
    assert preset_of("best") == METHODS["best"]
    assert preset_of("gptq") == Preset(LayerWise(solver="gptq"))
    found = preset_of("best", {"damping": 0.5}, ["features"])
    expected = METHODS["best"].method
    layers = replace(expected.layers, damping=0.5)
    assert found.method == replace(expected, blocks=["features"], layers=layers)
    assert found.finetune == METHODS["best"].finetune


def test_glyphs_are_the_same_every_time_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (glyphs.load("train", 16, seed=3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(state, torch.get_rng_state())


class _Holder(nn.Module):
    """Four integers, of which `changed` is counted up, and a scale in the graph."""

    def __init__(self, changed: int | None, scale: float) -> None:
        super().__init__()
        weight = torch.arange(4, dtype=torch.int8)
        if changed is not None:
            weight[changed] += 1
        self.register_buffer("weight", weight)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, self.weight) * self.scale


def _holder(changed: int | None = None, scale: float = 0.5) -> fx.GraphModule:
    return fx.symbolic_trace(_Holder(changed, scale))


@pytest.mark.parametrize("changed", range(4))
def test_the_digest_changes_when_one_integer_does(changed: int) -> None:
    before = integers.digests(_holder())
    assert integers.differing(before, integers.digests(_holder())) == []
    assert integers.differing(before, integers.digests(_holder(changed))) == ["weight"]


def test_digests_tell_type_shape_and_the_graphs_numbers() -> None:
    before, model = integers.digests(_holder()), _holder()
    assert integers.differing(before, integers.digests(_holder(scale=0.25))) == ["(numbers of the graph)"]
    for other in (model.weight.view(torch.uint8), model.weight.reshape(2, 2)):
        model.weight = other
        assert integers.differing(before, integers.digests(model)) == ["weight"]
    assert integers.differing(before, {}) == sorted(before)


def test_comparison_names_the_tensor_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def learned(changed: int | None, error: float) -> tuple[fx.GraphModule, Report]:
        layer = LayerReport(
            "layer", "linear", (), (2, 2), 4, 1.0, error, 1.0, 2 * error, True, 0.0, 0.0, "kept", 9, 0.0
        )
        return _holder(changed), Report("LayerWise", "Annealing", "recipe", [layer], [], output_error=error)

    before, after = str(tmp_path / "before.json"), str(tmp_path / "after.json")
    monkeypatch.setattr(integers, "CASES", {"one": lambda: learned(None, 0.1), "two": lambda: learned(None, 0.2)})
    assert integers.main([before]) == 0
    assert integers.main([after, "--against", before]) == 0
    assert capsys.readouterr().out.count(": the same (") == 2
    monkeypatch.setitem(integers.CASES, "two", lambda: learned(2, 0.3))
    assert integers.main([after, "--against", before]) == 1
    printed = capsys.readouterr().out
    assert "one: the same (" in printed
    assert "two: output error 0.2, now 0.3; losses of 1 layers times 1.500 (1.500 to 1.500); " in printed
    assert "; 1 of 2 tensors differ: weight" in printed
    assert integers.main([after, "--against", before, "--cases", "on"]) == 0
    monkeypatch.setitem(integers.CASES, "three", lambda: learned(None, 0.1))
    assert integers.main([after, "--against", before, "--cases", "three"]) == 1
    assert "three: not in the other file" in capsys.readouterr().out


def test_every_deliberate_fault_still_finds_its_passage(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutations.main(["--check"]) == 0
    assert f"{len(mutations.FAULTS)} faults" in capsys.readouterr().out


@pytest.mark.parametrize("host", ["fx", "pt2e"])
def test_a_model_of_torchvision_is_learned_exactly(host):
    found = model_zoo.run("squeezenet1_1", host)
    assert found.traced
    assert found.exact
    assert found.learned is not None
    assert found.learned[1] == 26
    assert found.skipped == found.problem == ""


def test_a_model_that_a_host_does_not_prepare_is_told_with_its_error(monkeypatch):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    monkeypatch.setitem(model_zoo.MODELS, "branches", (Branches, 8))
    found = model_zoo.run("branches", "fx")
    assert not found.traced
    assert "TraceError" in found.problem


def test_a_server_path_is_compared_and_one_without_its_package_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    calibration, _ = glyphs.load("train", 32, seed=1)
    model = servers.learn(networks.load("resnet20"), 4, list(calibration.split(16)), tmp_path)
    monkeypatch.setattr(servers, "learn", lambda *_: model)

    def missing(_: server_paths.Model):
        raise ImportError("nothing of that name")

    monkeypatch.setitem(server_paths.RUNTIMES, "openvino", missing)
    servers.main(["onnxruntime", "openvino", "--images", "32", "--test-images", "64", "--rounds", "1", "--bits", "4"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows[:4]] == [
        ["ONNX Runtime", "float", "-"],
        ["ONNX Runtime", "W4A8", "yes"],
        ["ONNX Runtime, INT4", "W4A8", "yes"],
        ["ONNX Runtime, INT4 in memory", "W4A8", "yes"],
    ]
    assert float(rows[0][4]) < 0.01 < float(rows[1][4]) < 10
    assert int(rows[2][7]) < int(rows[1][7]) < int(rows[0][7])
    assert rows[4][0] == "openvino: pip install openvino"


def test_integers_of_a_server_path_differ_where_one_does() -> None:
    weights = [torch.arange(6).reshape(2, 3), torch.arange(4).reshape(2, 2)]
    assert server_paths.same_integers([one.to(torch.int8) for one in reversed(weights)], weights)
    assert not server_paths.same_integers([weights[0], weights[1].t()], weights)
    assert not server_paths.same_integers(weights[:1], weights)
