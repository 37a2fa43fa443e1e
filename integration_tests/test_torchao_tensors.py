"""Learned integers as torchao's tensors: the same weights, and everything that takes torchao's own takes them."""

from __future__ import annotations

import copy
import functools
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_to_reference_fx
from torch.nn.utils.parametrizations import weight_norm
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.pt2e import PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer

from adaround_plugin import (
    InvalidModelError,
    InvalidOptionError,
    get_adaround_qconfig_mapping,
    get_report,
    get_weight_only_backend_config,
)
from adaround_plugin.deployment.torchao_tensors import to_torchao
from adaround_plugin.graph.arguments import argument
from adaround_plugin.graph.operators import is_linear
from adaround_plugin.hosts.learned import learned_layers, learned_weights
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer, get_adaround_weight_spec
from adaround_plugin.hosts.pt2e.compat import annotate_inputs
from integration_tests.benchmarks.executorch_backends import lowered, run_program
from integration_tests.models import assert_unchanged, batches, images, learn, prepared_model, snapshot
from integration_tests.pt2e_models import calibrated, convert, exported, x86

DATA = batches(32)


class Net(nn.Module):
    """Three linear layers, one without a bias."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make().eval()


@functools.cache
def net() -> nn.Module:
    """The model of most tests; not to be changed."""
    return seeded(Net)


@functools.cache
def program() -> fx.GraphModule:
    return exported(net(), DATA[0], ({0: torch.export.Dim("batch")},))


def learned_pt2e(model: nn.Module, data: Any, layers: Any = None, **options: Any) -> fx.GraphModule:
    quantizer = AdaRoundWeightOnlyQuantizer(layers, linear_only=True, **options)
    return learn(calibrated(exported(model, data[0], strict=True), data, quantizer), data)


@functools.cache
def learned(host: str = "PT2E", **options: Any) -> fx.GraphModule:
    """`net` with learned weights; not to be changed."""
    if host == "PT2E":
        return learn(calibrated(program(), DATA, AdaRoundWeightOnlyQuantizer(**options)), DATA)
    return learn(prepared_model(net(), DATA, activation_bits=None, **options), DATA)


def reference(result: fx.GraphModule, host: str) -> nn.Module:
    """What the host's own conversion makes of it."""
    if host == "PT2E":
        return convert(result)
    return convert_to_reference_fx(copy.deepcopy(result), backend_config=get_weight_only_backend_config())


def attributes(tensor: Any) -> dict[str, Any]:
    """What a tensor of torchao is made of: dtypes and shapes of its parts, and its other attributes."""
    parts = [*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", [])]
    others = [*tensor.tensor_attribute_names, *getattr(tensor, "optional_tensor_attribute_names", [])]
    found = {name: getattr(tensor, name) for name in parts}
    described = {
        name: None if part is None else (part.dtype, part.shape, part.stride()) for name, part in found.items()
    }
    return {"class": type(tensor), **described, **{name: getattr(tensor, name) for name in others}}


def assert_holds(result: nn.Module, found: fx.GraphModule) -> None:
    """Every learned layer of a model holds the learned integers and biases, bit for bit."""
    for name, layer in learned_layers(found).items():
        linear = result.get_submodule(name)
        assert torch.equal(linear.weight.qdata.long(), layer.integers)
        assert torch.equal(linear.weight.dequantize(), layer.grid.dequantize(layer.integers))
        bias = layer.modules[name]
        assert linear.bias is None if bias is None else torch.equal(linear.bias, bias)


# --- the same weights

OPTIONS = [
    {"weight_bits": 2},
    {"weight_bits": 2, "symmetric": True},
    {"weight_bits": 3, "symmetric": False},
    {"weight_bits": 3, "per_channel": False},
    {"weight_bits": 4},
    {"weight_bits": 8, "symmetric": False},
    {"weight_bits": 8},
]
GROUPS = [{"weight_bits": bits, "group_size": 8, "symmetric": symmetric} for bits, symmetric in ((2, False), (4, True))]
CASES = [*(("PT2E", options) for options in OPTIONS + GROUPS), *(("FX", options) for options in OPTIONS)]


@pytest.mark.parametrize(("host", "options"), CASES, ids=str)
def test_weights_and_biases_are_the_learned_ones(host, options):
    found = learned(host, **options)
    result = to_torchao(net(), found)
    assert_holds(result, found)
    assert {layer.weight.target_dtype for layer in (result.first, result.second, result.head)} == {
        getattr(torch, f"int{options['weight_bits']}")
    }
    x = images(5, 32, seed=9)
    torch.testing.assert_close(result(x), reference(found, host)(x))


@pytest.mark.parametrize("bits", [3, 8])
def test_int8_tensors_hold_the_same_integers(bits):
    found = learned(weight_bits=bits, symmetric=True)
    result = to_torchao(net(), found, tensor="int8")
    assert_holds(result, found)
    assert isinstance(result.head.weight, Int8Tensor)
    x = images(5, 32, seed=9)
    torch.testing.assert_close(result(x), reference(found, "PT2E")(x))


@pytest.mark.parametrize("tensor", ["intx", "int8"])
def test_dynamic_activations_cost_at_most_half_a_step(tensor):
    layer = seeded(lambda: nn.Sequential(nn.Linear(32, 8)))
    found = learned_pt2e(layer, DATA, weight_bits=4)
    x = images(5, 32, seed=9)
    exact = to_torchao(layer, found, tensor=tensor)
    dynamic = to_torchao(layer, found, tensor=tensor, dynamic_activations=True)(x)
    ranges = x.amax(1) - x.amin(1) if tensor == "intx" else 2 * x.abs().amax(1)
    bound = 0.51 * ranges[:, None] / 254 * exact[0].weight.dequantize().abs().sum(1)
    assert bool(((dynamic - exact(x)).abs() <= bound).all())
    assert not torch.allclose(dynamic, exact(x))


def test_quantized_activations_of_the_learned_model_become_float():
    found = learn(calibrated(program(), DATA, x86(weight_bits=4)), DATA)
    assert_holds(to_torchao(net(), found), found)


class Tied(nn.Module):
    """One weight in two linear layers with biases of their own, or without."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32, bias), nn.Linear(32, 32, bias), nn.Linear(32, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class TiedToEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.embedding(x))))


class ByFunction(nn.Module):
    """Calls its layer's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_tied_layers_share_the_tensor_and_keep_their_biases(bias):
    model = seeded(lambda: Tied(bias))
    found = learned_pt2e(model, DATA, weight_bits=4)
    result = to_torchao(model, found)
    assert result.a.weight is result.b.weight
    for name, expected in learned_layers(found)["a"].modules.items():
        found_bias = result.get_submodule(name).bias
        assert found_bias is None if expected is None else torch.equal(found_bias, expected)
    assert not bias or not torch.equal(result.a.bias, result.b.bias)
    x = images(6, 32, seed=9)
    torch.testing.assert_close(result(x), reference(found, "PT2E")(x))


def test_layers_tied_for_fx_are_both_replaced():
    model = seeded(lambda: Tied(True))
    found = learn(prepared_model(model, DATA, activation_bits=None), DATA)
    result = to_torchao(model, found)
    assert_holds(result, found)
    assert set(learned_layers(found)) == {"a", "b", "c"}
    x = images(6, 32, seed=9)
    torch.testing.assert_close(result(x), reference(found, "FX")(x))


def test_a_head_tied_to_an_embedding_leaves_the_embedding_in_float():
    model = seeded(TiedToEmbedding)
    data = [torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = learned_pt2e(model, data, weight_bits=4)
    result = to_torchao(model, found)
    assert isinstance(result.head.weight, IntxUnpackedToInt8Tensor)
    assert torch.equal(result.embedding.weight, model.embedding.weight)
    torch.testing.assert_close(result(data[0]), reference(found, "PT2E")(data[0]))


def test_layers_of_functional_calls():
    model = seeded(ByFunction)
    found = learned_pt2e(model, DATA, weight_bits=4)
    result = to_torchao(model, found)
    assert_holds(result, found)
    torch.testing.assert_close(result(DATA[0]), reference(found, "PT2E")(DATA[0]))


def test_an_attention_of_torchs_is_left_out_by_name():
    model, data = seeded(Attention), batches(6, 32, sizes=(4, 4))
    found = learned_pt2e(model, data, layers={"attention.in_proj_weight": None, "attention.out_proj": None})
    result = to_torchao(model, found)
    assert list(learned_weights(found)) == ["head"]
    with torch.no_grad():
        torch.testing.assert_close(result(data[0]), reference(found, "PT2E")(data[0]))


def test_batch_norm_behind_a_convolution_is_no_obstacle():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)))
    data = batches(3, 8, 8)
    mapping = get_adaround_qconfig_mapping(activation_bits=None).set_module_name("0", None)
    found = learn(prepared_model(model, data, mapping=mapping, activation_bits=None), data)
    assert list(learned_weights(found)) == ["3"]
    torch.testing.assert_close(to_torchao(model, found)(data[0]), reference(found, "FX")(data[0]))


# --- whose memory


def test_nothing_of_the_users_is_changed_or_shared():
    model, found = copy.deepcopy(net()), learned(weight_bits=4)
    before, taken = snapshot(model), snapshot(found)
    result = to_torchao(model, found)
    with torch.no_grad():
        for layer in (result.first, result.head):
            for part in (layer.weight.qdata, layer.weight.scale, layer.weight.zero_point, layer.bias):
                part.add_(1)
    assert_unchanged(before, model)
    assert_unchanged(taken, found)
    assert type(model.first.weight) is nn.Parameter


def test_in_place_and_the_report():
    model, found = copy.deepcopy(net()), learned(weight_bits=4)
    assert to_torchao(model, found, inplace=True) is model
    assert_holds(model, found)
    assert get_report(model) is get_report(found)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- what takes torchao's own tensors

OWN = {
    ("intx", False, None): IntxWeightOnlyConfig(torch.int4, PerAxis(0)),
    ("intx", False, 8): IntxWeightOnlyConfig(torch.int4, PerGroup(8), mapping_type=MappingType.ASYMMETRIC),
    ("intx", True, 8): Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(8)),
    ("int8", False, None): Int8WeightOnlyConfig(set_inductor_config=False),
    ("int8", True, None): Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
}


@functools.cache
def four_bits(tensor: str, dynamic: bool, group_size: int | None = None) -> nn.Module:
    """`net` with 4-bit tensors of torchao; not to be changed."""
    found = learned(weight_bits=4, symmetric=True, group_size=group_size)
    return to_torchao(net(), found, tensor=tensor, dynamic_activations=dynamic)


@pytest.mark.parametrize("case", OWN, ids=str)
def test_tensors_are_of_the_kind_that_torchao_makes(case):
    own = copy.deepcopy(net())
    quantize_(own, OWN[case])
    assert attributes(four_bits(*case).first.weight) == attributes(own.first.weight)


@pytest.mark.parametrize("case", OWN, ids=str)
def test_state_dicts_are_saved_and_loaded(case):
    result, loaded, file = four_bits(*case), copy.deepcopy(net()), io.BytesIO()
    loaded.second.bias = result.second.bias
    torch.save(result.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(loaded(DATA[0]), result(DATA[0]))


@pytest.mark.parametrize("case", [("intx", True, 8), ("int8", True, None)], ids=str)
def test_programs_are_compiled(case):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    layer = four_bits(*case).first
    torch.testing.assert_close(torch.compile(layer)(DATA[0]), layer(DATA[0]))


@pytest.mark.parametrize(
    ("options", "share"),
    [({"weight_bits": 8}, 0.31), ({"weight_bits": 4}, 0.19), ({"weight_bits": 4, "group_size": 32}, 0.2)],
    ids=str,
)
def test_executorch_runs_dynamic_activations_and_stores_few_bits(options, share):
    model, data = seeded(lambda: Net(128)), batches(128, sizes=(16, 16))
    found = learned_pt2e(model, data, **options)
    result = to_torchao(model, found, dynamic_activations=True)
    x = images(16, 128, seed=9)
    file = lowered(result, x)
    output = run_program(file, x)
    apart = (output - result(x)).square().mean() / result(x).var()
    assert apart < (1e-10 if options["weight_bits"] == 8 else 1e-4)
    assert len(file) < share * 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        IntxWeightOnlyConfig(torch.int4),
        Int8DynamicActivationIntxWeightConfig(torch.int4, PerAxis(0), MappingType.ASYMMETRIC),
    ],
    ids=["activations in float", "zero points"],
)
def test_what_the_guide_says_that_xnnpack_gets_wrong(config):
    """Tensors that torchao itself made; once this fails, the guide has to be changed."""
    own, x = copy.deepcopy(net()), images(16, 32, seed=9)
    quantize_(own, config)
    expected = own(x)
    assert (run_program(lowered(own, x), x) - expected).square().mean() > 0.01 * expected.var()


@pytest.mark.parametrize(("dynamic", "tied"), [(False, False), (True, False), (True, True)])
def test_transformers_saves_and_loads(tmp_path: Path, dynamic: bool, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=1, use_cache=False, tie_word_embeddings=tied)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LlamaForCausalLM(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids).logits

    model, ids = seeded(Logits), torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))
    layers: dict[str, Any] = {".*down_proj": {"weight_bits": 8}, **({} if tied else {"model.lm_head": None})}
    quantizer = AdaRoundWeightOnlyQuantizer(layers, linear_only=True, weight_bits=4, group_size=16)
    found = learn(calibrated(exported(model, ids), [ids], quantizer), [ids], correct_bias=False)
    result = to_torchao(model, found, dynamic_activations=dynamic)
    inner: Any = result.model
    inner.config.quantization_config = TorchAoConfig(IntxWeightOnlyConfig(torch.int4))
    inner.config.tie_word_embeddings = False
    inner.hf_quantizer = AutoHfQuantizer.from_config(inner.config.quantization_config, pre_quantized=True)
    inner.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head.weight, IntxUnpackedToInt8Tensor) is tied
    mlp = loaded.model.layers[0].mlp
    assert (mlp.up_proj.weight.target_dtype, mlp.down_proj.weight.target_dtype) == (torch.int4, torch.int8)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, result(ids))


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tensor": "int4"}, "tensor"),
        ({"dynamic_activations": 1}, "dynamic_activations"),
        ({"inplace": "yes"}, "inplace"),
        ({"model": None}, "model"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, match):
    with pytest.raises(InvalidOptionError, match=match):
        to_torchao(**{"model": net(), "learned": learned(weight_bits=4), **arguments})


class With(Quantizer):
    """Weights of linear layers with one specification."""

    def __init__(self, spec: QuantizationSpec) -> None:
        super().__init__()
        self.spec = spec

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        for node in model.graph.nodes:
            if is_linear(node.target):
                annotate_inputs(node, {argument(node, 1, "weight"): self.spec})
        return model

    def validate(self, model: fx.GraphModule) -> None:
        pass


UNSIGNED = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=15,
    qscheme=torch.per_channel_affine,
    ch_axis=0,
    is_dynamic=False,
    observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-12),
)


class OwnBias(nn.Module):
    """A linear layer's weight with a bias that is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shift = nn.Linear(32, 8, bias=False), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.first.weight, self.shift)


def norm(channels: int) -> nn.BatchNorm1d:
    """A batch norm that changes its input."""
    made = nn.BatchNorm1d(channels)
    nn.init.uniform_(made.weight, 0.5, 2)
    made.running_mean.uniform_(-1, 1)
    return made


def _normed() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(32, 8), norm(8)))


def _normed_fx() -> tuple[nn.Module, fx.GraphModule]:
    return _normed(), learn(prepared_model(_normed(), DATA, activation_bits=None), DATA)


def _normed_pt2e() -> tuple[nn.Module, fx.GraphModule]:
    return _normed(), learned_pt2e(_normed(), DATA)


def _convolution() -> tuple[nn.Module, fx.GraphModule]:
    model, data = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))), batches(3, 8, 8)
    return model, learn(calibrated(exported(model, data[0]), data, AdaRoundWeightOnlyQuantizer()), data)


def _reparametrized() -> tuple[nn.Module, fx.GraphModule]:
    model = copy.deepcopy(net())
    weight_norm(model.head)
    return model, learned(weight_bits=4)


def _own_bias() -> tuple[nn.Module, fx.GraphModule]:
    model = seeded(OwnBias)
    return model, learned_pt2e(model, DATA)


def _attention() -> tuple[nn.Module, fx.GraphModule]:
    model, data = seeded(Attention), batches(6, 32, sizes=(4, 4))
    return model, learned_pt2e(model, data, layers={"attention.in_proj_weight": None})


def _spec(spec: QuantizationSpec) -> tuple[nn.Module, fx.GraphModule]:
    return copy.deepcopy(net()), learn(calibrated(program(), DATA, With(spec)), DATA)


BAD_MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], str]] = {
    "not learned": (lambda: (net(), calibrated(program(), DATA, AdaRoundWeightOnlyQuantizer())), "report"),
    "converted": (lambda: (net(), convert(learned(weight_bits=4))), "convert"),
    "no module with a report": (lambda: (net(), net()), "report"),
    "another model": (lambda: (seeded(lambda: nn.Sequential(nn.Linear(32, 8))), learned(weight_bits=4)), "first"),
    "another width": (lambda: (seeded(lambda: Net(16)), learned(weight_bits=4)), r"first.*\(16, 16\).*\(32, 32\)"),
    "another dtype": (lambda: (copy.deepcopy(net()).bfloat16(), learned(weight_bits=4)), "first.*bfloat16"),
    "a convolution": (_convolution, "'0'.*Conv2d.*linear_only"),
    "an attention of torch's": (_attention, "attention.out_proj.*NonDynamicallyQuantizableLinear"),
    "a batch norm that prepare_fx folded": (_normed_fx, "layer '0'.*took in a batch norm"),
    "a batch norm that prepare_pt2e folded": (_normed_pt2e, "layer '0'.*took in a batch norm"),
    "a computed weight": (_reparametrized, "head.*computes its weight"),
    "a bias from elsewhere": (_own_bias, "first.*bias"),
    "scales of columns": (lambda: _spec(get_adaround_weight_spec(4, ch_axis=1)), "first.*axis 1"),
    "unsigned integers": (lambda: _spec(UNSIGNED), "first.*0 to 15"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused_and_left_alone(case):
    make, match = BAD_MODELS[case]
    model, found = make()
    before = snapshot(model)
    with pytest.raises(InvalidModelError, match=match):
        to_torchao(model, found, inplace=True)
    assert_unchanged(before, model)


@pytest.mark.parametrize("toolkit", ["fx", "pt2e"])
def test_batch_norms_that_stay_or_go_into_convolutions_are_no_matter(toolkit):
    convolutions = (nn.Conv1d(4, 6, 3), norm(6), nn.ReLU(), nn.Flatten())
    model = seeded(lambda: nn.Sequential(*convolutions, nn.Linear(36, 8), nn.ReLU(), norm(8)))
    data = batches(4, 8)
    if toolkit == "fx":
        config = QConfigMapping().set_module_name("4", get_adaround_qconfig_mapping("x86", 4, None).global_qconfig)
        found = learn(prepared_model(model, data, mapping=config, activation_bits=None), data)
    else:
        found = learned_pt2e(model, data)
    packed = to_torchao(model, found)
    assert isinstance(packed.get_submodule("4").weight, IntxUnpackedToInt8Tensor)
    # what was learned already computes what its conversion does, for which torchao takes half a minute here
    torch.testing.assert_close(packed(data[0]), found(data[0]), rtol=1e-4, atol=1e-4)


def test_the_report_is_read_from_a_traced_model():
    model = fx.symbolic_trace(net())
    packed = to_torchao(model, learned(weight_bits=4))
    assert get_report(packed).layers == get_report(learned(weight_bits=4)).layers


@pytest.mark.parametrize("options", [{"symmetric": False}, {"group_size": 8}], ids=str)
def test_int8_refuses_grids_that_it_cannot_hold(options):
    model = copy.deepcopy(net())
    before = snapshot(model)
    with pytest.raises(InvalidOptionError, match=r"int8.*first.*intx"):
        to_torchao(model, learned(weight_bits=4, **options), tensor="int8", inplace=True)
    assert_unchanged(before, model)
