"""What a pass must leave alone: batches, torch's generator, memory, the default device; and errors that are others'."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx

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
from adaround_plugin.paper.cross_entropy import CrossEntropy
from adaround_plugin.paper.weights import round_weights
from integration_tests.models import (
    RECIPE,
    SHAPE,
    Residual,
    batches,
    conv,
    images,
    learn,
    prepared_model,
    relative_error,
)
from integration_tests.pt2e_models import EveryOperator, convert, prepared_pt2e

PREPARE = {"fx": prepared_model, "pt2e": prepared_pt2e}
METHODS: dict[str, Any] = {
    "default": "default",
    "blocks": BlockWise(layers=LayerWise(**RECIPE), iterations=5),
    "fisher": LayerWise(column_weighting="fisher", damping=0.1, propagate_error=True, correct_bias=True),
}


@pytest.fixture
def data() -> list[Tensor]:
    # of one size, for which a program is exported
    return batches(*SHAPE, sizes=(8, 8))


# --- torch's generator, and memory


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", PREPARE)
def test_torch_s_generator_is_left_alone(host, method, data):
    prepared = PREPARE[host](Residual(), data)
    before = torch.get_rng_state()
    adaround(prepared, data, METHODS[method], finetune=Finetune(iterations=2), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    round_weights(prepared, "stochastic")
    assert torch.equal(torch.get_rng_state(), before)


def modules() -> weakref.WeakSet[nn.Module]:
    """All modules that are alive."""
    gc.collect()
    return weakref.WeakSet(one for one in gc.get_objects() if issubclass(type(one), nn.Module))


@pytest.mark.parametrize("host", PREPARE)
def test_no_copy_of_the_model_stays_in_memory(host, data):
    prepared = PREPARE[host](Residual(), data)
    # what torch keeps once, whatever is converted
    learn(prepared, data, solver="nearest")
    before = modules()
    learn(prepared, data, solver="nearest")
    assert [type(one).__name__ for one in modules() - before] == []


# --- operators that write into what they are given


class Out(nn.Module):
    """Writes into its input, into an activation, into an empty tensor, and two results at once."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.b, self.where = conv(), conv(4, 2), where

    def forward(self, x):
        if self.where == "input":
            torch.mul(x, 0.25, out=x)
        if self.where == "shape":
            x = torch.add(x, 1, out=torch.empty(0))
        y = self.a(x)
        if self.where == "activation":
            torch.mul(y, y, out=y)
        if self.where == "pair":
            values, places = torch.empty_like(y.sum(1, keepdim=True)), torch.empty_like(y.argmax(1, keepdim=True))
            least, _ = torch.min(x, 1, keepdim=True, out=(values, places))
            y = y + values + least
        return self.b(y + x)


@pytest.mark.parametrize("where", ["input", "activation", "pair"])
@pytest.mark.parametrize("host", PREPARE)
def test_an_operator_with_out_does_not_write_into_the_batches(host, where, data):
    model = Out(where).eval().requires_grad_(False)
    quantizer = {} if host == "fx" else {"quantizer": EveryOperator(activation=None)}
    options = {"activation_bits": None} if host == "fx" else quantizer
    prepared = PREPARE[host](model, data, **options)
    given = copy.deepcopy(data)
    result = adaround(prepared, given, LayerWise(**RECIPE, holdout=0.25), progress=False)
    for one, before in zip(given, data, strict=True):
        assert torch.equal(one, before)
    converted = convert_to_reference_fx(copy.deepcopy(result)) if host == "fx" else convert(result)
    with torch.no_grad():
        outputs = [(model(batch.clone()), converted(batch.clone())) for batch in data]
    held = torch.arange(16) % 4 == (((torch.arange(16) // 4 + 1).double() * 0.6180339887498949).frac() * 4).long()
    assert get_report(result).output_error == pytest.approx(relative_error(outputs, held), rel=1e-3)


@pytest.mark.parametrize("host", PREPARE)
def test_there_are_derivatives_through_an_operator_with_out(host, data):
    prepared = PREPARE[host](Out("activation").eval().requires_grad_(False), data)
    result = adaround(prepared, data, LayerWise(column_weighting="fisher", damping=0.1), progress=False)
    assert not any("derivative" in layer.note for layer in get_report(result).layers)


def scaled(x: Tensor, by: float) -> Tensor:
    """Not traced, and in place."""
    return x.mul_(by)


fx.wrap("scaled")


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 2)

    def forward(self, x):
        return self.b(self.a(scaled(x, 0.5)))


def test_code_that_is_not_traced_must_not_write_into_its_input(data):
    prepared = prepared_model(Writes(), data, activation_bits=None)
    given = copy.deepcopy(data)
    with pytest.raises(InvalidModelError, match="node 'scaled': writes into its input") as caught:
        learn(prepared, given)
    assert caught.value.remedy
    for one, before in zip(given, data, strict=True):
        assert torch.equal(one, before)


# --- a default device


DRAWING = {
    **METHODS,
    "paper": Paper(iterations=2, holdout=0.25),
    "cross entropy": LayerWise(solver=CrossEntropy(samples=8, iterations=2), **RECIPE),
}


@pytest.mark.parametrize("method", DRAWING)
@pytest.mark.parametrize("host", PREPARE)
def test_a_default_device_changes_nothing(host, method, data):
    prepared = PREPARE[host](Residual(), data, **({"histogram": True} if host == "fx" else {}))

    def results() -> list[fx.GraphModule]:
        learned = adaround(prepared, data, DRAWING[method], finetune=Finetune(iterations=2), progress=False)
        return [learned, round_weights(prepared, "stochastic")]

    expected = results()
    with torch.device("meta"):
        found = results()
    for one, other in zip(found, expected, strict=True):
        for value, wanted in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(value, wanted)


@pytest.mark.parametrize("method", ["default", "blocks"])
def test_a_default_dtype_changes_nothing(data, method):
    """In FX torch's own conversion makes other scales of activations."""
    prepared = PREPARE["pt2e"](Residual(), data)
    layers = LayerWise(column_weighting="fisher", output_hessian=True)
    options = {
        "method": BlockWise(layers=layers, iterations=3) if method == "blocks" else layers,
        "finetune": Finetune(iterations=2),
        "progress": False,
    }
    expected = adaround(prepared, data, **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = adaround(prepared, data, **options)
    finally:
        torch.set_default_dtype(before)
    assert not [layer.note for layer in get_report(found).layers if "derivative" in layer.note]
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_inference_mode_is_refused(data):
    prepared = PREPARE["fx"](Residual(), data)
    with torch.inference_mode(), pytest.raises(InvalidOptionError, match=r"inference_mode.*Call it outside"):
        adaround(prepared, data, progress=False)


# --- errors that are others'


def allocated(x: Tensor, threshold: int) -> Tensor:
    """As torch's allocator does, where more samples come than fit in memory."""
    return x + torch.empty(2**46 if x.shape[0] > threshold else 0).sum()


fx.wrap("allocated")


class Allocates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 2)

    def forward(self, x):
        return self.b(allocated(self.a(x), 8))


def test_running_out_of_memory_is_reported_as_that(data):
    prepared = prepared_model(Allocates(), data, activation_bits=None)
    with pytest.raises(RuntimeError, match="allocate memory"):
        adaround(prepared, data, BlockWise(layers=LayerWise(**RECIPE), iterations=2), progress=False)


class Sizes(nn.Module):
    """Adds what has the right shape for some batches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 2)
        self.register_buffer("shift", torch.zeros(1, 4, 6, 6))

    def forward(self, x):
        return self.b(self.a(x) + self.shift)


@pytest.mark.parametrize("method", METHODS)
def test_a_shape_error_of_the_network_is_its_own(method, data):
    prepared = prepared_model(Sizes(), data, activation_bits=None)
    with pytest.raises(RuntimeError, match="must match the size of tensor") as caught:
        adaround(prepared, [images(8, 4, 5, 5)], METHODS[method], progress=False)
    assert not isinstance(caught.value, InvalidOptionError)
    assert any("while running node add" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("host", PREPARE)
def test_a_derived_type_is_excluded_with_its_base(host, data):
    class Own(nn.Conv2d):
        """A convolution."""

    class Further(Own):
        """Another."""

    model = nn.Sequential(Own(4, 4, 3), nn.ReLU(), Further(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    prepared = PREPARE[host](model, data, **({} if host == "fx" else {"quantizer": EveryOperator()}))
    for kind, left in ((nn.Conv2d, {"4"}), (Own, {"4"}), (Further, {"0", "4"}), (nn.Linear, {"0", "2"})):
        result = learn(prepared, data, exclude=[kind], solver="nearest")
        # FX writes out the code of a module that is not torch's own
        assert {layer.name.removesuffix(".weight") for layer in get_report(result).layers} == left


@pytest.mark.parametrize("host", PREPARE)
def test_a_type_that_no_layer_has_is_refused_with_those_there_are(host, data):
    prepared = PREPARE[host](Residual(), data)
    with pytest.raises(InvalidOptionError, match=r"exclude: no layer is a Conv1d; there are \[.*onv"):
        learn(prepared, data, exclude=[nn.Conv1d])


# --- several processes

SCRIPT = """
import sys, torch
from torch import distributed
from adaround_plugin import InvalidOptionError, analyze, equalize
from integration_tests.models import Residual, SHAPE, batches, learn, prepared_model

rank, processes, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
data = batches(*SHAPE, sizes=(4,))
prepared = prepared_model(Residual(), data)
distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
for work in (
    lambda: learn(prepared, data, solver="nearest"),
    lambda: equalize(Residual().eval(), (data[0],), activations=data),
    lambda: analyze(prepared, data, bits=[4], progress=False),
):
    try:
        work()
        print("done")
    except InvalidOptionError as error:
        print(error)
distributed.barrier()
distributed.destroy_process_group()
learn(prepared, data, solver="nearest")
"""


def run_processes(count: int, folder: Path) -> list[str]:
    """What each process of a group says."""
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(rank), str(count), str(folder / "group")],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * count, said
    return [out.strip() for out, _ in said]


def test_one_of_several_processes_is_refused_with_what_to_do(tmp_path):
    for said in run_processes(2, tmp_path):
        learning, *others = said.splitlines()
        assert learning.startswith("process_group: not given, and torch.distributed joins 2 processes")
        assert len(others) == 2
        for line in others:
            assert line.startswith("torch.distributed: joins 2 processes")
        for line in (learning, *others):
            assert line.endswith("save the result, and load it in the others.")


def test_a_group_of_one_process_is_fine(tmp_path):
    assert run_processes(1, tmp_path) == ["done\ndone\ndone"]
