"""Saved and loaded roundings: a fresh model converts to the same model, bit for bit, or the file is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torchao.quantization.pt2e import MinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from adaround_plugin import (
    BlockWise,
    Finetune,
    InvalidModelError,
    InvalidOptionError,
    adaround,
    get_report,
    get_weight_only_backend_config,
    load_rounding,
    save_rounding,
)
from adaround_plugin.hosts.learned import learned_layers
from adaround_plugin.hosts.open import is_exported
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.paper.weights import round_weights
from adaround_plugin.report import KEY
from adaround_plugin.rounding.packing import packed_length
from adaround_plugin.saving.observers import read_observers
from integration_tests import pt2e_models
from integration_tests.models import (
    QUICK,
    assert_equal_trees,
    batches,
    call,
    fresh_net,
    own_mapping,
    prepared_net,
)
from integration_tests.pt2e_models import EveryOperator, Unchanged, convert, exported, x86

# torch's own warning while it saves and loads quantized tensors
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")

DATA = batches(4, 8, 8, sizes=(8, 8))


class Net(nn.Module):
    """Convolutions, one depthwise, one transposed, one without a bias, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6)
        self.c, self.d = nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Conv2d(4, 6, 3, bias=False)
        self.e, self.f = nn.Linear(6, 12), nn.Linear(12, 5)
        self.pool = nn.MaxPool2d(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(self.pool(torch.relu(self.a(x)))))))
        return self.f(torch.relu(self.e(torch.relu(self.d(x)).mean((2, 3)))))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


def fresh_fx(model: nn.Module | None = None, example: Tensor = DATA[0], **options: Any) -> fx.GraphModule:
    """A prepared model of FX that has seen no data."""
    config = get_weight_only_backend_config() if options.get("activation_bits", 8) is None else None
    mapping = own_mapping(options.pop("backend", "x86"), **options)
    return prepare_fx(copy.deepcopy(model) or network(), mapping, (example,), backend_config=config)


def fresh_pt2e(quantizer: Quantizer | None = None, model: nn.Module | None = None) -> fx.GraphModule:
    """A prepared program that has seen no data."""
    return prepare_pt2e(exported(model or network(), DATA[0]), quantizer or x86())


def groups(size: int = 2) -> Quantizer:
    """Weights of 2 bits in groups of columns."""
    return AdaRoundWeightOnlyQuantizer(weight_bits=2, group_size=size)


def calibrated(prepared: fx.GraphModule, data: Any = DATA) -> fx.GraphModule:
    with torch.no_grad():
        for batch in copy.deepcopy(data):
            call(prepared, batch)
    return prepared


def converted(model: fx.GraphModule) -> fx.GraphModule:
    """What the host makes of a copy."""
    return convert(model) if is_exported(model) else convert_to_reference_fx(copy.deepcopy(model))


def state(model: nn.Module) -> dict[str, Any]:
    """The state of a converted model as plain tensors."""
    found = {}
    for name, value in model.state_dict().items():
        is_quantized = isinstance(value, Tensor) and value.is_quantized
        found[name] = (value.int_repr(), value.dequantize()) if is_quantized else value
    return found


def assert_converts_alike(one: fx.GraphModule, other: fx.GraphModule, batch: Any) -> None:
    """The state, the code and the outputs of what the host makes of both are equal, bit for bit."""
    ours, theirs = converted(one), converted(other)
    assert ours.code == theirs.code
    found, expected = state(ours), state(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype
        assert_equal_trees(found[name], value)
    assert_equal_trees(call(ours, copy.deepcopy(batch)), call(theirs, copy.deepcopy(batch)))


Case = tuple[Callable[[], fx.GraphModule], dict[str, Any]]
FINETUNED = {"finetune": Finetune(iterations=3)}
CASES: dict[str, Case] = {
    "fx 2 affine": (lambda: fresh_fx(weight_bits=2, symmetric=False), {}),
    "fx 3 per tensor": (lambda: fresh_fx(weight_bits=3, per_channel=False), {}),
    "fx 4 symmetric": (fresh_fx, {}),
    "fx 8": (lambda: fresh_fx(weight_bits=8), {}),
    "fx weight only": (lambda: fresh_fx(weight_bits=3, activation_bits=None), {}),
    "fx integer biases": (lambda: fresh_fx(backend="qnnpack"), {"integer_biases": True}),
    "fx learned activations": (lambda: fresh_fx(activation_bits=4), FINETUNED),
    "fx histograms": (lambda: fresh_fx(histogram=True), {"exclude": ["b"]}),
    "pt2e 2 affine": (lambda: fresh_pt2e(EveryOperator(2, symmetric=False)), {}),
    "pt2e 3 per tensor": (lambda: fresh_pt2e(EveryOperator(3, per_channel=False)), {}),
    "pt2e 4 symmetric": (fresh_pt2e, {}),
    "pt2e 8 dynamic": (lambda: fresh_pt2e(EveryOperator(8, activation="dynamic")), {}),
    "pt2e groups": (lambda: fresh_pt2e(groups()), {}),
    "pt2e integer biases": (lambda: fresh_pt2e(x86(weight_bits=4)), {"integer_biases": True}),
    "pt2e learned activations": (lambda: fresh_pt2e(x86(activation_bits=4)), FINETUNED),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_model_converts_to_the_same_model(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    learned = adaround(calibrated(make()), DATA, QUICK, progress=False, **options)
    path = tmp_path / "rounding.safetensors"
    save_rounding(learned, path)
    fresh = make()
    before = Unchanged(fresh)
    loaded = load_rounding(fresh, path)
    before.check()
    assert_converts_alike(loaded, learned, DATA[0])
    assert get_report(loaded) == get_report(learned)


@pytest.mark.parametrize("case", ["fx learned activations", "pt2e 2 affine"])
def test_a_model_that_saw_other_data_takes_it_in_place_and_what_was_loaded_can_be_saved(
    case: str, tmp_path: Path
) -> None:
    make, options = CASES[case]
    learned = adaround(calibrated(make()), DATA, QUICK, progress=False, **options)
    save_rounding(learned, tmp_path / "file")
    other = calibrated(make(), [5 * DATA[0]])
    assert load_rounding(other, tmp_path / "file", inplace=True) is other
    assert_converts_alike(other, learned, DATA[0])
    save_rounding(other, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


# tied and shared, functional, computed and standalone weights, and others that are not learned
NETS = ["Tied", "FunctionalWeights", "Generated", "Standalone", "Recurrent"]
PROGRAMS: dict[str, Callable[[], Quantizer]] = {
    **dict.fromkeys(("Tied", "SharedFunctionalWeight", "Tokens", "Attention"), x86),
    # biases are quantized with scales that are derived from the activations'
    "Residual": lambda: EveryOperator(derived_bias=True),
}


@pytest.mark.parametrize("name", [*(f"fx {name}" for name in NETS), *(f"pt2e {name}" for name in PROGRAMS)])
def test_networks_of_every_kind_take_what_was_saved(name: str, tmp_path: Path) -> None:
    toolkit, _, net = name.partition(" ")
    if toolkit == "fx":
        _, prepared, data = prepared_net(net)
        _, fresh, _ = fresh_net(net)
    else:
        _, program, data = pt2e_models.exported_net(net)
        fresh = prepare_pt2e(copy.deepcopy(program), PROGRAMS[net]())
        prepared = pt2e_models.calibrated(program, data, PROGRAMS[net]())
    learned = adaround(prepared, data, QUICK, progress=False)
    save_rounding(learned, tmp_path / "file")
    assert_converts_alike(load_rounding(fresh, tmp_path / "file"), learned, data[0])


class CalledBothWays(nn.Module):
    """A layer that is called as a module, with its bias, and as a function, without."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(x)) + F.linear(x, self.layer.weight))


def test_a_bias_that_was_not_saved_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = CalledBothWays().eval(), batches(6, sizes=(8, 8))
    prepared = calibrated(fresh_fx(model, example=data[0]), data)
    learned = adaround(prepared, data, QUICK, progress=False)
    save_rounding(learned, tmp_path / "file")
    fresh = calibrated(fresh_fx(model, example=data[0]), data)
    assert_converts_alike(load_rounding(fresh, tmp_path / "file"), learned, data[0])


def test_native_modules_are_the_same(tmp_path: Path) -> None:
    learned = adaround(calibrated(fresh_fx()), DATA, QUICK, progress=False)
    save_rounding(learned, tmp_path / "file")
    ours, theirs = (convert_fx(one) for one in (load_rounding(fresh_fx(), tmp_path / "file"), learned))
    assert torch.equal(ours(DATA[0]), theirs(DATA[0]))


def test_integers_take_their_bits_and_nothing_of_float_weights_is_kept(tmp_path: Path) -> None:
    for bits in (2, 3, 4, 8):
        learned = adaround(calibrated(fresh_fx(weight_bits=bits)), DATA, QUICK, progress=False)
        save_rounding(learned, tmp_path / "file")
        tensors = load_file(tmp_path / "file")
        packed = {name: tensor for name, tensor in tensors.items() if name.endswith("integers")}
        layers = learned_layers(learned).values()
        assert [one.numel() for one in packed.values()] == [
            packed_length(layer.integers.numel(), bits) for layer in layers
        ]
        rest = sum(tensor.numel() for name, tensor in tensors.items() if name not in packed)
        # a scale, a zero point and a bias of each output, and two numbers of each observer
        assert rest < sum(layer.integers.numel() for layer in layers) / 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each host."""
    folder = tmp_path_factory.mktemp("saved")
    found = {}
    for name, make in {"fx": fresh_fx, "pt2e": fresh_pt2e, "groups": lambda: fresh_pt2e(groups())}.items():
        found[name] = folder / name
        save_rounding(adaround(calibrated(make()), DATA, QUICK, progress=False), found[name])
    return found


def _with(change: Callable[[Any], Any]) -> nn.Module:
    """The network, with something changed."""
    model = network()
    with torch.no_grad():
        change(model)
    return model


class Other(Net):
    """Another activation function between two layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(self.pool(torch.relu(self.a(x)))))))
        return self.f(torch.tanh(self.e(torch.relu(self.d(x)).mean((2, 3)))))


def _other() -> nn.Module:
    torch.manual_seed(0)
    return Other().eval()


def _wider(model: nn.Module) -> nn.Module:
    model.f = nn.Linear(12, 7)
    return model.eval()


def _strided(model: nn.Module) -> nn.Module:
    model.d = nn.Conv2d(4, 6, 3, stride=2, bias=False)
    model.d.weight.copy_(network().d.weight)
    return model.eval()


# the file, a model for which it is not, and what is said
FOREIGN: dict[str, tuple[str, Callable[[], nn.Module], str]] = {
    "not prepared": ("fx", network, "prepared: does not come from prepare_fx or prepare_pt2e"),
    "another toolkit": ("fx", fresh_pt2e, "prepared: was prepared for PT2E, the file is of FX"),
    "fx bits": ("fx", lambda: fresh_fx(weight_bits=3), "layer 'a': has grid affine -4..3 .* not symmetric -8..7"),
    "fx scheme": ("fx", lambda: fresh_fx(symmetric=False), "layer 'a': has grid affine .* not symmetric"),
    "fx per tensor": ("fx", lambda: fresh_fx(per_channel=False), "layer 'a': has grid .* per tensor"),
    "fx activations": ("fx", lambda: fresh_fx(activation_bits=4), "observer '.*': has .* from 0 to 15, .* to 127"),
    "fx backend": ("fx", lambda: fresh_fx(backend="qnnpack"), "observer '.*': has .* from 0 to 255, .* to 127"),
    "fx other weights": ("fx", lambda: fresh_fx(network(1)), "prepared: has other float weights in 'a', .* and 1 more"),
    "fx one weight": (
        "fx",
        lambda: fresh_fx(_with(lambda model: model.e.weight[0, 0].add_(1e-6))),
        "prepared: has other float weights in 'e'",
    ),
    "fx pool": (
        "fx",
        lambda: fresh_fx(_with(lambda model: setattr(model, "pool", nn.MaxPool2d(3, 1)))),
        "prepared: is not the network that was learned: 'pool' differ",
    ),
    "fx function": ("fx", lambda: fresh_fx(_other()), "prepared: has other observers than the model that was saved"),
    "fx stride": ("fx", lambda: fresh_fx(_with(_strided)), r"layer 'd': has operator .*\(2, 2\).*, not "),
    "fx shape": ("fx", lambda: fresh_fx(_with(_wider)), "prepared: has other float weights in 'f'"),
    "fx in float": (
        "fx",
        lambda: prepare_fx(network(), own_mapping().set_module_name("e", None), (DATA[0],)),
        "prepared: has other observers than the model that was saved",
    ),
    "fx trained": ("fx", lambda: fresh_fx().train(), "prepared: is in train mode"),
    "pt2e bits": ("pt2e", lambda: fresh_pt2e(x86(weight_bits=3)), "layer 'a': has grid .*-4..3 .* not .*-8..7"),
    "pt2e function": ("pt2e", lambda: fresh_pt2e(model=_other()), "prepared: .* 'forward'"),
    "pt2e quantizer": ("pt2e", lambda: fresh_pt2e(EveryOperator()), "prepared: has other observers"),
    "pt2e groups": ("groups", lambda: fresh_pt2e(groups(3)), "layer 'e': .* groups of 3, .* not .* groups of 2"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_something_else_is_refused(case: str, saved: dict[str, Path]) -> None:
    name, make, said = FOREIGN[case]
    model = make()
    before = Unchanged(model)
    with pytest.raises(InvalidModelError, match=said):
        load_rounding(model, saved[name], inplace=True)
    before.check()


def test_what_was_not_learned_must_be_the_same(tmp_path: Path) -> None:
    _, prepared, data = prepared_net("Tokens")
    save_rounding(adaround(prepared, data, QUICK, progress=False), tmp_path / "file")
    _, fresh, _ = fresh_net("Tokens")
    with torch.no_grad():
        fresh.embedding.weight[0, 0] += 1e-6
    with pytest.raises(InvalidModelError, match=r"is not the network that was learned: 'embedding\.weight' differ"):
        load_rounding(fresh, tmp_path / "file")


def test_a_spoiled_file_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    fresh, path = fresh_fx(), tmp_path / "file"
    before = Unchanged(fresh)
    content = saved["fx"].read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidModelError, match="is cut off"):
        load_rounding(fresh, path, inplace=True)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InvalidModelError, match="was changed"):
        load_rounding(fresh, path, inplace=True)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InvalidModelError, match="holds tensors, but is no 'adaround_plugin rounding'"):
        load_rounding(fresh, path, inplace=True)
    with pytest.raises(FileNotFoundError):
        load_rounding(fresh, tmp_path / "none", inplace=True)
    before.check()


def test_what_cannot_be_saved_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    learned = adaround(calibrated(fresh_fx()), DATA, QUICK, progress=False)
    with pytest.raises(InvalidModelError, match="model: carries no AdaRound report"):
        save_rounding(calibrated(fresh_fx()), path)
    with pytest.raises(InvalidModelError, match="model: carries no AdaRound report"):
        save_rounding(round_weights(calibrated(fresh_fx()), "floor"), path)
    with pytest.raises(InvalidOptionError, match=r"path: .* is a folder"):
        save_rounding(learned, tmp_path)
    changed = copy.deepcopy(learned)
    with torch.no_grad():
        changed.a[0].weight.add_(1e-4) if isinstance(changed.a, nn.Sequential) else changed.a.weight.add_(1e-4)
    with pytest.raises(InvalidModelError, match="layer 'a': was changed after it was learned"):
        save_rounding(changed, path)
    assert path.read_text() == "mine"


def test_a_loaded_model_can_be_learned_on(saved: dict[str, Path]) -> None:
    loaded = load_rounding(fresh_fx(), saved["fx"])
    again = adaround(loaded, DATA, BlockWise(iterations=2, layers=QUICK), progress=False)
    assert get_report(again).method == "BlockWise"
    assert loaded.meta[KEY].method == "LayerWise"


def test_an_observer_without_such_a_scale_cannot_be_saved() -> None:
    prepared = calibrated(fresh_pt2e())
    name = next(name for name, module in prepared.named_modules() if isinstance(module, MinMaxObserver))
    prepared.get_submodule(name).qscheme = torch.per_channel_affine_float_qparams
    with pytest.raises(InvalidModelError, match=rf"observer '{name}': MinMaxObserver has no per-tensor or per-channel"):
        read_observers(prepared)
