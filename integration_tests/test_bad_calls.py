"""Bad calls of everything that is public: an error of ours each time, of the right class, that names what is wrong.

A row is what is called, the class of the error, and a regular expression for its subject.
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from neural_compressor.torch import quantization as inc
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from adaround_plugin import (
    AdaRoundError,
    AdaRoundObserver,
    BlockWise,
    Finetune,
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    LayerWise,
    NonFiniteError,
    Paper,
    adaround,
    equalize,
    get_adaround_qconfig_mapping,
    get_equalization_report,
    get_report,
    load_rounding,
    save_rounding,
)
from adaround_plugin.hosts.fx.observers import AdaRoundActivationObserver
from adaround_plugin.hosts.pt2e import (
    AdaRoundGroupObserver,
    AdaRoundWeightOnlyQuantizer,
    get_adaround_weight_spec,
    get_adaround_x86_inductor_config,
)
from adaround_plugin.hosts.pt2e import AdaRoundObserver as PT2EObserver
from adaround_plugin.hosts.pt2e.observers import AdaRoundActivationObserver as PT2EActivationObserver
from adaround_plugin.inc import AdaRoundConfig, save
from adaround_plugin.paper.cross_entropy import CrossEntropy
from adaround_plugin.paper.forms import LayerForms
from adaround_plugin.paper.task_loss import expand_task_loss
from adaround_plugin.paper.weights import best_of_draws, round_weights, write_integers
from adaround_plugin.solvers import Annealing, CoordinateDescent, Relaxation, get_solver
from integration_tests.models import RECIPE, batches, images, prepared_model
from integration_tests.pt2e_models import Unchanged, prepared_pt2e, x86

SHAPE = (4, 6, 6)
NAN, INF = float("nan"), float("inf")
QUICK = LayerWise(solver="nearest", **RECIPE)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Permuted(nn.Module):
    """Its input is permuted before a layer reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x.permute(0, 2, 3, 1))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@functools.cache
def data() -> list[Tensor]:
    return batches(*SHAPE, sizes=(6, 6))


@functools.cache
def prepared(host: str = "fx") -> fx.GraphModule:
    """A calibrated model; not to be changed."""
    return prepared_model(net(), data()) if host == "fx" else prepared_pt2e(net(), data(), x86())


@functools.cache
def weight_only() -> fx.GraphModule:
    return prepared_model(net(), data(), activation_bits=None)


@functools.cache
def permuted() -> fx.GraphModule:
    torch.manual_seed(0)
    return prepared_model(Permuted(), data(), activation_bits=None)


@functools.cache
def permuted_and_quantized() -> fx.GraphModule:
    torch.manual_seed(0)
    return prepared_model(Permuted(), data())


@functools.cache
def pooled() -> fx.GraphModule:
    torch.manual_seed(0)
    return prepared_model(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), data())


@dataclass(frozen=True)
class Bad:
    """A bad call.

    Attributes:
        name: of the row.
        error: the class of the error.
        subject: a regular expression for all of its subject.
        call: makes it.
    """

    name: str
    error: type[AdaRoundError]
    subject: str
    call: Callable[[], Any]


def arguments(
    make: Callable[..., Any], subject: str = "{}", error: type[AdaRoundError] = InvalidOptionError, **values: list[Any]
) -> Iterator[Bad]:
    """One row for each value of each argument.

    Args:
        make: what is called.
        subject: of the error, with the name of the argument in it.
        error: its class.
        **values: by argument.
    """
    called = getattr(make, "__name__", str(make))
    for argument, given in values.items():
        for value in given:
            name = f"{called} {argument}={str(value)[:40]!r}"
            yield Bad(name, error, subject.format(argument), functools.partial(make, **{argument: value}))


COUNTS = [0, -1, 1.5, "x", None, True]
RATES = [0, -1.0, NAN, INF, "x", None, True]
FLAGS = ["x", None, 1]
BITS = [1, 9, -4, 4.0, "4", True, [4]]
OBJECT = object()

METHODS = [
    *arguments(
        LayerWise,
        r"LayerWise\.{}",
        solver=["anealing", None, 3, Annealing, [], {}, OBJECT, nn.ReLU(), ["gptq"]],
        search_scale=["mse", None, 1, 0.5, []],
        propagate_error=FLAGS,
        correct_bias=FLAGS,
        output_hessian=FLAGS,
        column_weighting=["norm", None, True, ["fisher"], 3],
        levels=["nearest", None, "ALL", 2],
        damping=[*RATES[:-1], [0.1]],
        holdout=[-0.1, 0.6, NAN, INF, "half", None, True],
        max_columns=COUNTS,
    ),
    *arguments(
        BlockWise,
        r"BlockWise\.{}",
        layers=[None, "default", Paper(), LayerWise],
        blocks=[[], "body", [3], 3, {}, [nn.ReLU]],
        iterations=COUNTS,
        batch_size=COUNTS,
        learning_rate=RATES,
        drop=[-0.1, 1, NAN, "x", None],
        weighs_outputs=FLAGS,
        learns_scale=FLAGS,
    ),
    *arguments(
        Paper,
        r"Paper\.{}",
        iterations=COUNTS,
        batch_size=COUNTS,
        learning_rate=RATES,
        regularization=[-1, NAN, INF, "x", None],
        warm_start=[-0.1, 1, NAN, "x"],
        beta=[(20,), (20, -1), 20, "ab", (NAN, 2), None, (2, 3, 4)],
        asymmetric=FLAGS,
        activation=FLAGS,
        variant=[None, "sigmoid", 3, nn.ReLU],
        start=["gptq", Annealing, 3],
        correct_bias=FLAGS,
        search_scale=["auto", None],
        holdout=[-0.1, 0.6, "x"],
        max_columns=COUNTS[:3],
    ),
    *arguments(
        Finetune,
        r"Finetune\.{}",
        iterations=[value for value in COUNTS if value is not None],
        batch_size=COUNTS,
        learning_rate=RATES,
        integers=["yes", None, 1],
    ),
]

SOLVERS = [
    *arguments(
        Annealing,
        r"Annealing\.{}",
        sweeps=COUNTS[1:],
        hot=RATES,
        cold=RATES,
        descent_sweeps=COUNTS[1:],
    ),
    *arguments(CoordinateDescent, r"CoordinateDescent\.{}", sweeps=COUNTS[1:]),
    *arguments(
        Relaxation,
        r"Relaxation\.{}",
        start=["gptq", Annealing, 3, OBJECT],
        iterations=COUNTS,
        learning_rate=RATES,
        regularization=[-1, NAN, "x"],
        warm_up=[-0.1, 1, "x"],
        beta=[(20,), "ab", None],
        soft_rounding=[None, "sigmoid", 3],
    ),
    *arguments(
        CrossEntropy,
        r"CrossEntropy\.{}",
        samples=COUNTS,
        elite=[0, 1.5, NAN, "x"],
        smoothing=[0, 1.5, NAN, "x"],
        iterations=COUNTS,
        seed=["x", 2**70, -(2**70), 1.5, None, True],
    ),
    *arguments(get_solver, solver=["anealing", None, 3, Annealing, []]),
]

mapping = get_adaround_qconfig_mapping
OBSERVERS = [
    *arguments(
        mapping,
        backend=["cuda", None, 3, ["x86"], ""],
        weight_bits=[*BITS, None],
        activation_bits=BITS,
        per_channel=FLAGS,
        symmetric=["x", 1, 0],
        layer_bits=[[("a", 4)], 3, "a", {1: 4}, {"a"}],
        model=[3, "net", Net],
    ),
    *(
        Bad(
            f"layer_bits {bits!r}", InvalidOptionError, r"layer_bits\[.*\]", functools.partial(mapping, layer_bits=bits)
        )
        for bits in (
            {"a": "4"},
            {"a": 9},
            {"a": None},
            {"a": (4,)},
            {"a": (4, 9)},
            {"a": ("4", 8)},
            {"[": 4},
            {"a": [4, 8]},
        )
    ),
    Bad("bits of no pattern", InvalidOptionError, r"layer_bits\['\['\]", lambda: mapping(layer_bits={"[": 4})),
    Bad("onednn", InvalidOptionError, "symmetric", lambda: mapping("onednn", symmetric=False)),
    Bad("no layer", InvalidOptionError, r"layer_bits\['c'\]", lambda: mapping(layer_bits={"c": 4}, model=net())),
    *arguments(
        AdaRoundObserver,
        bits=BITS,
        ch_axis=[9, -1, 1.5, "x", None, True],
        scale=["max", None, 3, []],
        qscheme=[torch.per_channel_affine_float_qparams],
        dtype=[torch.quint8, torch.float32],
    ),
    *arguments(AdaRoundObserver, "quant_min, quant_max", quant_min=[-200, 3, "x"], quant_max=[0, 200, -9, 1.5]),
    *arguments(AdaRoundActivationObserver, bits=BITS, dtype=[torch.qint8], qscheme=[torch.per_tensor_symmetric]),
    *arguments(AdaRoundActivationObserver, "quant_min, quant_max", quant_min=[1, "x"], quant_max=[0, 256, "x"]),
    Bad(
        "an axis that the weight lacks",
        InvalidOptionError,
        "ch_axis",
        lambda: AdaRoundObserver(ch_axis=3)(torch.randn(3, 4)),
    ),
    *arguments(
        PT2EObserver,
        ch_axis=[9, -1, "x", None],
        scale=["max", None],
        scale_dtype=[torch.int8, "float16", None],
        dtype=[torch.uint8],
    ),
    *arguments(PT2EObserver, "quant_min, quant_max", quant_min=[-200, "x"], quant_max=[0, 1.5]),
    *arguments(PT2EActivationObserver, dtype=[torch.int8], qscheme=[torch.per_tensor_symmetric]),
    *arguments(PT2EActivationObserver, "quant_min, quant_max", quant_min=[1], quant_max=[0, 256, "x"]),
    *arguments(AdaRoundGroupObserver, group_size=COUNTS),
    *arguments(
        get_adaround_weight_spec,
        weight_bits=[*BITS, None],
        per_channel=FLAGS,
        symmetric=["x", 1],
        ch_axis=[9, -1, "x", None],
        group_size=[value for value in COUNTS if value is not None],
        scale=["max", None],
        scale_dtype=[torch.int8, "float16"],
    ),
    Bad("groups", InvalidOptionError, "group_size", lambda: get_adaround_weight_spec(group_size=4, per_channel=False)),
    *arguments(
        get_adaround_x86_inductor_config,
        weight_bits=[*BITS, None],
        activation_bits=BITS,
        per_channel=FLAGS,
        is_dynamic=FLAGS,
    ),
    Bad(
        "dynamic weights only",
        InvalidOptionError,
        "is_dynamic",
        lambda: get_adaround_x86_inductor_config(activation_bits=None, is_dynamic=True),
    ),
    *arguments(
        AdaRoundWeightOnlyQuantizer,
        layers=[3, ["a"], "a", {1: None}],
        linear_only=FLAGS,
        weight_bits=BITS,
        per_channel=FLAGS,
        symmetric=["x"],
        group_size=[0, "x"],
        scale=["max"],
    ),
    *arguments(AdaRoundWeightOnlyQuantizer, "options", bits=[4], granularity=["group"]),
    *(
        Bad(f"layers {one!r}", InvalidOptionError, subject, functools.partial(AdaRoundWeightOnlyQuantizer, {"a": one}))
        for one, subject in (
            (4, r"layers\['a'\]"),
            ({"weight_bits": 9}, "weight_bits"),
            ({"bits": 4}, "options"),
            ({"symmetric": "x"}, "symmetric"),
        )
    ),
]


def learned(host: str, given: Any = None, method: Any = QUICK, **options: Any) -> Any:
    """`adaround` on a shared model."""
    given = data() if given is None else given
    return adaround(prepared(host), given, method, **{"progress": False, **options})


def calls_of_adaround(host: str) -> Iterator[Bad]:
    """Bad arguments and bad batches for one host."""

    def bad(name: str, error: type[AdaRoundError], subject: str, *args: Any, **options: Any) -> Bad:
        return Bad(f"{host} {name}", error, subject, functools.partial(learned, host, *args, **options))

    for argument, values in {
        "method": ["defualt", None, 3, LayerWise, ["default"], {}, Annealing(), nn.ReLU()],
        "finetune": ["yes", 3, Finetune, [True]],
        "inputs": ["x", 3, [0]],
        "seed": ["zero", 2**70, -(2**70), 1.5, None, True],
        "progress": FLAGS,
        "inplace": FLAGS,
        "integer_biases": FLAGS,
        "backend_config": ["x86", 3, {}],
        "checkpoint": [3, ["x"], True],
        "exclude": [3, [3], [None], ["c"], ["["], [nn.Conv1d], [int], nn.LSTM, [["a"]], ""],
    }.items():
        for value in values:
            yield bad(f"{argument}={str(value)[:40]}", InvalidOptionError, argument, **{argument: value})
    for name, value in {
        "none": [],
        "iterator": iter(()),
        "number": 3,
        "tensor": images(6, *SHAPE),
        "text": "data",
    }.items():
        yield bad(f"data: {name}", InvalidBatchError, "data", value)
    yield bad("data: dict", InvalidBatchError, "data", {"x": images(6, *SHAPE)})
    one = images(6, *SHAPE)
    for name, value in {
        "numpy": one.numpy(),
        "numpy in a tuple": (one.numpy(),),
        "numpy in a dict": {"x": one.numpy()},
        "uint8": one.to(torch.uint8),
        "int8": one.to(torch.int8),
        "int64": one.long(),
        "bool": one > 0,
        "half": one.half(),
        "double": one.double(),
        "bfloat16": one.bfloat16(),
        "NaN": one.clone().fill_(NAN),
        "infinity": one.clone().fill_(INF),
        "meta": one.to("meta"),
        "integers on meta": one.long().to("meta"),
        "no samples": one[:0],
        "text": "image",
        "nothing": None,
        "number": 3,
        "empty tuple": (),
        "empty dict": {},
        "other name": {"image": one},
        "too many": (one, one),
    }.items():
        yield bad(f"batch: {name}", InvalidBatchError, "batch 1", [data()[0], value])
    shapes = {"channels": (6, 3, 6, 6), "small": (6, 4, 2, 2), "flat": (6, 4, 36), "one row": (6, 4, 1, 6)}
    for name, shape in {**shapes, "five axes": (6, 1, 4, 6, 6), "one axis": (6,)}.items():
        yield bad(f"batch: {name}", InvalidBatchError, "layer 'a'|batch 0", [images(*shape)])
    yield bad("blocks", InvalidOptionError, "BlockWise.blocks", method=BlockWise(blocks=["c"]))


def spoiled(change: Callable[[fx.GraphModule], Any], host: str = "fx") -> Callable[[], Any]:
    """`adaround` on a changed copy."""

    def call() -> None:
        model = copy.deepcopy(prepared(host))
        change(model)
        adaround(model, data(), QUICK, progress=False)

    return call


def filled(name: str, value: float) -> Callable[[fx.GraphModule], Any]:
    """Set an entry of a parameter."""

    def change(model: fx.GraphModule) -> None:
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = value

    return change


def uncalibrated() -> fx.GraphModule:
    return prepare_fx(net(), mapping(), (data()[0],))


MODELS = [
    *(
        Bad(f"prepared={value!r}"[:40], InvalidModelError, "prepared", functools.partial(adaround, value, data()))
        for value in (None, 3, "model", [], Net, Net().eval(), nn.ReLU())
    ),
    Bad("not prepared", InvalidModelError, "prepared", lambda: adaround(fx.symbolic_trace(net()), data())),
    Bad("converted", InvalidModelError, "prepared", lambda: adaround(convert_fx(copy.deepcopy(prepared())), data())),
    Bad("not calibrated", InvalidModelError, "observer .*", lambda: adaround(uncalibrated(), data())),
    Bad("train mode", InvalidModelError, "prepared", spoiled(lambda model: model.train())),
    *(
        Bad(f"{host} {name}", error, "parameter.*", spoiled(change, host))
        for host, weight in (("fx", "b.weight"), ("pt2e", "b.weight"))
        for name, error, change in (
            ("half", InvalidModelError, lambda model: model.half()),
            ("double", InvalidModelError, lambda model: model.double()),
            ("meta", InvalidModelError, lambda model: model.to("meta")),
            ("NaN", NonFiniteError, filled(weight, NAN)),
            ("infinity", NonFiniteError, filled(weight, INF)),
        )
    ),
    *arguments(get_report, "model", InvalidModelError, model=[None, 3, "model", nn.ReLU(), []]),
    *arguments(get_equalization_report, "model", InvalidModelError, model=[None, 3, "model", nn.ReLU(), []]),
    Bad("no report", InvalidModelError, "model", lambda: get_report(prepared())),
]

SMALL = [images(6, 4, 1, 1)]
BATCHES = [
    *(
        Bad(
            f"{name}: {kind}",
            InvalidBatchError,
            "layer 'a'|layer '0'|batch 0",
            functools.partial(lambda model, given: adaround(model(), [given], QUICK, progress=False), model, given),
        )
        for name, model in {
            "weight only": weight_only,
            "permuted": permuted,
            "permuted and quantized": permuted_and_quantized,
            "reflection": pooled,
        }.items()
        for kind, given in {
            "uint8": images(6, *SHAPE).to(torch.uint8),
            "bool": images(6, *SHAPE) > 0,
            "int64": images(6, *SHAPE).long(),
            "channels": images(6, 3, 6, 6),
        }.items()
    ),
    Bad("reflection: small", InvalidBatchError, "layer '0'", lambda: adaround(pooled(), SMALL, QUICK, progress=False)),
    Bad("derivatives: small", InvalidBatchError, "layer 'a'", lambda: adaround(weight_only(), SMALL, progress=False)),
]


def equalized(**given: Any) -> nn.Module:
    return equalize(**{"model": net(), "example_inputs": (data()[0],), **given})


EQUALIZATION = [
    *arguments(
        equalized,
        relu6=["clip", None, 6, []],
        absorb_bias=FLAGS,
        iterations=COUNTS,
        tolerance=[-1, NAN, "x", None],
        limit=[0.5, -1, NAN, "x", None],
        example_inputs=[data()[0], None, 3, {}, (images(6, 3, 6, 6),), (), ("x",)],
        inputs=["x", lambda batch: batch],
    ),
    *arguments(equalized, error=InvalidModelError, model=[None, 3, "model", [], Net]),
    *arguments(equalized, error=InvalidBatchError, activations=[3, [], data()[0], "x"]),
    *(
        Bad(f"equalize: {name}", error, subject, functools.partial(equalized, **given))
        for name, error, subject, given in (
            ("train mode", InvalidModelError, "model", {"model": Net()}),
            ("half", InvalidModelError, "parameter .*", {"model": net().half()}),
            ("meta", InvalidModelError, "parameter .*", {"model": net().to("meta")}),
            ("prepared", InvalidModelError, "model", {"model": prepared()}),
            ("bad batch", InvalidBatchError, "batch 1", {"activations": [data()[0], images(6, 3, 6, 6)]}),
            ("numpy", InvalidBatchError, "batch 0", {"activations": [data()[0].numpy()]}),
            ("uint8", InvalidBatchError, "batch 0", {"activations": [data()[0].to(torch.uint8)]}),
            ("inputs", InvalidOptionError, "inputs", {"activations": data(), "inputs": "x"}),
        )
    ),
]


def rounded(scheme: Any = "floor", **given: Any) -> Any:
    return round_weights(prepared(), scheme, **given)


def written(**integers: Any) -> Any:
    return write_integers(prepared(), integers)


def drawn(**given: Any) -> Any:
    return best_of_draws(prepared(), **{"score": lambda model: 0.0, "draws": 1, **given})


def local(**given: Any) -> Any:
    return LayerForms.of(prepared(), "b").local(**{"batches": data(), **given})


def expanded(**given: Any) -> Any:
    wanted = {"model": net(), "name": "b", "loss": lambda run, batch: run(batch).square().mean((1, 2, 3))}
    return expand_task_loss(**{**wanted, "batches": data(), **given})


PAPER = [
    *arguments(
        rounded,
        scheme=["round", None, 3, []],
        layers=["a", 3, [3], ["c"], ["["], [None]],
        seed=["x", 2**70, 1.5, None],
        inplace=FLAGS,
        backend_config=["x86"],
    ),
    *(
        Bad(
            f"write_integers {str(values)[:30]}", InvalidOptionError, "integers.*", functools.partial(written, b=values)
        )
        for values in (
            3,
            None,
            [1],
            torch.zeros(2, 4, 1, 1),
            torch.zeros(2, 4, 1, 1, dtype=torch.bool),
            torch.zeros(2, 4, dtype=torch.long),
            torch.full((2, 4, 1, 1), 99),
        )
    ),
    Bad("write_integers c", InvalidOptionError, "integers", lambda: written(c=torch.zeros(1))),
    *arguments(functools.partial(write_integers, prepared()), integers=[3, [1], None, {1: 2}]),
    *arguments(drawn, draws=COUNTS, score=[None, 3, "x", lambda model: NAN], seed=["x", 2**70]),
    *arguments(local, damping=RATES),
    *arguments(local, error=InvalidBatchError, batches=[[], 3, data()[0]]),
    Bad("LayerForms c", InvalidOptionError, "name", lambda: LayerForms.of(prepared(), "c")),
    *arguments(expanded, chunk=COUNTS, name=["c", "act", None, 3], loss=[lambda run, batch: 3.0, None, "x"]),
    *arguments(expanded, error=InvalidBatchError, batches=[[], 3]),
    *arguments(expanded, error=InvalidModelError, model=[None, 3, Net]),
]


def saved(model: Any) -> Any:
    return save(model, tempfile.gettempdir())


def quantized(**given: Any) -> Any:
    return inc.quantize(net(), AdaRoundConfig(**given), run_fn=lambda model: None)


def packed(**given: Any) -> Any:
    return inc.quantize(nn.Sequential(nn.Linear(4, 2)).eval(), AdaRoundConfig(**given), run_fn=lambda model: None)


INC = [
    *arguments(
        AdaRoundConfig,
        dtype=["int8", None, 3],
        bits=[1, 9, "4", 4.0, [], [4, 9]],
        use_sym=["x", 1],
        w_granularity=["per_group", None],
        group_size=[0, -2, "x", 1.5],
        act_dtype=["int8", None],
        method=["defualt", None, 3, LayerWise()],
        solver=["anealing", Annealing, Annealing(), 3],
        search_scale=["mse", 3],
        propagate_error=["x"],
        correct_bias=["x"],
        column_weighting=["norm", 3],
        output_hessian=["x"],
        levels=["nearest"],
        finetune=["x", 3],
        seed=["x", 1.5, 2**70],
        white_list=[3, "linear", [3]],
    ),
    *arguments(AdaRoundConfig, r"(LayerWise\.)?{}", damping=[0, -1.0, NAN, INF, "x"], holdout=[0.6, "x"]),
    *arguments(AdaRoundConfig, r"(LayerWise\.)?{}", max_columns=[0, "x"]),
    *arguments(AdaRoundConfig, "AdaRoundConfig", weight_bits=[4], preset=[["default"]]),
    *arguments(
        functools.partial(save, folder=tempfile.gettempdir()), error=InvalidModelError, model=[None, 3, nn.ReLU()]
    ),
]

FOLDER = Path("no such folder") / "file"
SAVING = [
    *arguments(functools.partial(save_rounding, None), path=[3, None, ".", FOLDER]),
    *arguments(functools.partial(load_rounding, None), path=[3, None, ".", FOLDER]),
    *arguments(functools.partial(load_rounding, None, "file"), inplace=FLAGS),
    *arguments(functools.partial(save_rounding, path="file"), "model", InvalidModelError, learned=[None, 3, Net]),
]

BAD = [
    *METHODS,
    *SOLVERS,
    *OBSERVERS,
    *calls_of_adaround("fx"),
    *calls_of_adaround("pt2e"),
    *MODELS,
    *BATCHES,
    *EQUALIZATION,
    *PAPER,
    *INC,
    *SAVING,
]


@pytest.fixture(scope="module", autouse=True)
def _shared_models_stay_as_they_are() -> Iterator[None]:
    models = [prepared("fx"), prepared("pt2e"), weight_only()]
    before = [Unchanged(model) for model in models]
    yield
    for one in before:
        one.check()


def label(bad: Bad) -> str:
    """The same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", bad.name)[:90]


@pytest.mark.parametrize("bad", BAD, ids=label)
def test_a_bad_call_is_an_error_of_ours_that_says_what_to_do(bad: Bad) -> None:
    with pytest.raises(AdaRoundError) as caught:
        bad.call()
    found = caught.value
    assert type(found) is bad.error, found
    assert re.fullmatch(bad.subject, found.subject), found
    assert found.problem
    assert found.remedy.endswith(".")
