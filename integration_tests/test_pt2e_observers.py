"""The observer and the settings of the PT2E flow on their own, as torchao's prepare and convert use them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import get_default_x86_inductor_quantization_config

from adaround_plugin.errors import AdaRoundError, InvalidModelError, InvalidOptionError
from adaround_plugin.hosts import weight_observers
from adaround_plugin.hosts.pt2e import AdaRoundObserver, get_adaround_weight_spec, get_adaround_x86_inductor_config
from adaround_plugin.hosts.pt2e.host import PreparedPT2E
from adaround_plugin.hosts.pt2e.observers import AdaRoundGroupObserver
from adaround_plugin.rounding.grid import Grid, GridSpec, integer_range, same_grid
from adaround_plugin.rounding.ranges import min_max_grid, min_mse_grid
from integration_tests.models import batches
from integration_tests.pt2e_models import EveryOperator, all_converted, convert, prepared_pt2e

SCHEMES = {
    torch.per_tensor_symmetric: (None, True),
    torch.per_tensor_affine: (None, False),
    torch.per_channel_symmetric: (0, True),
    torch.per_channel_affine: (0, False),
}


def weight(seed: int = 0) -> Tensor:
    return torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(seed)) + 0.2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_grid_is_that_of_the_arguments(bits, scheme):
    axis, symmetric = SCHEMES[scheme]
    low, high = integer_range(bits)
    observer = AdaRoundObserver(quant_min=low, quant_max=high, qscheme=scheme)
    assert observer.spec == GridSpec(low, high, axis, symmetric, torch.int8)
    x = weight()
    assert observer(x) is x
    scale, zero_point = observer.calculate_qparams()
    expected = min_mse_grid(x, observer.spec)
    assert torch.equal(scale, expected.scale.reshape(-1))
    assert torch.equal(zero_point, expected.zero_point.reshape(-1))
    assert scale.shape == zero_point.shape == ((1,) if axis is None else (4,))


@pytest.mark.parametrize(("method", "choose"), [("mse", min_mse_grid), ("minmax", min_max_grid)])
def test_scale_chooses_the_method(method, choose):
    observer = AdaRoundObserver(scale=method)
    observer(nn.Parameter(weight()))
    scale, _ = observer.calculate_qparams()
    assert torch.equal(scale, choose(weight(), observer.spec).scale)
    assert not scale.requires_grad


def test_the_default_is_four_symmetric_bits_per_channel():
    observer = AdaRoundObserver()
    assert observer.spec == GridSpec(-8, 7, 0, True, torch.int8)
    assert observer.scale_method == "mse"
    assert isinstance(observer, ObserverBase)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": torch.qint8}, r"dtype.*torch\.int8"),
        ({"dtype": torch.uint8}, "dtype"),
        ({"scale": "l2"}, "scale.*minmax.*mse"),
        ({"qscheme": torch.per_channel_affine_float_qparams}, "qscheme"),
        ({"quant_min": -129}, "quant_min, quant_max"),
        ({"quant_max": 128}, "quant_min, quant_max"),
        ({"quant_min": 1}, "quant_min, quant_max"),
        ({"quant_max": 0}, "quant_min, quant_max"),
    ],
)
def test_arguments_out_of_range_are_refused(options, match):
    with pytest.raises(AdaRoundError, match=match):
        AdaRoundObserver(**options)


def test_an_observer_that_saw_nothing_says_so():
    with pytest.raises(InvalidModelError, match="AdaRoundObserver: has seen no weight"):
        AdaRoundObserver().calculate_qparams()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda observer: pickle.loads(pickle.dumps(observer))])
def test_a_copy_answers_the_same(way):
    observer = AdaRoundObserver(quant_min=-4, quant_max=3)
    observer(weight())
    for a, b in zip(observer.calculate_qparams(), way(observer).calculate_qparams(), strict=True):
        assert torch.equal(a, b)
    changed = way(observer)
    changed(10 * weight())
    assert not torch.equal(changed.calculate_qparams()[0], observer.calculate_qparams()[0])


# --- settings


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_weight_specification(bits, per_channel, symmetric):
    spec = get_adaround_weight_spec(bits, per_channel, symmetric)
    low, high = integer_range(bits)
    assert (spec.dtype, spec.quant_min, spec.quant_max, spec.is_dynamic) == (torch.int8, low, high, False)
    axis = 0 if per_channel else None
    assert spec.ch_axis == axis
    assert SCHEMES[spec.qscheme] == (axis, symmetric)
    hash(spec)  # torchao groups by it


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "4", None])
def test_bits_out_of_range_are_refused(bits):
    for make in (get_adaround_weight_spec, get_adaround_x86_inductor_config):
        with pytest.raises(InvalidOptionError, match="from 2 to 8"):
            make(bits)


def test_an_unknown_scale_is_refused_where_it_is_asked_for_or_at_prepare():
    with pytest.raises(InvalidOptionError, match=r"scale.*minmax.*mse"):
        get_adaround_weight_spec(scale="l2").observer_or_fake_quant_ctr()


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_the_configuration_for_x86_has_the_hosts_activations(is_dynamic):
    default = get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic)
    config = get_adaround_x86_inductor_config(3, is_dynamic=is_dynamic)
    for field in ("dtype", "quant_min", "quant_max", "qscheme", "is_dynamic"):
        assert getattr(config.input_activation, field) == getattr(default.input_activation, field)
    assert config.weight.quant_max == 3
    assert config.weight.qscheme == torch.per_channel_symmetric
    assert get_adaround_x86_inductor_config(per_channel=False).weight.qscheme == torch.per_tensor_symmetric


def test_weight_only_has_no_activations():
    config = get_adaround_x86_inductor_config(activation_bits=None)
    assert config.input_activation is None
    assert config.output_activation is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"activation_bits": 1}, "activation_bits.*1"),
        ({"activation_bits": 9}, "activation_bits.*9"),
        ({"activation_bits": 4.0}, "activation_bits"),
        ({"activation_bits": "8"}, "activation_bits"),
        ({"activation_bits": None, "is_dynamic": True}, "is_dynamic.*activation_bits=8"),
    ],
)
def test_settings_out_of_range_are_refused(options, match):
    with pytest.raises(InvalidOptionError, match=match):
        get_adaround_x86_inductor_config(**options)


# --- without the pass


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_without_the_pass_the_host_rounds_to_nearest(axis, symmetric, per_channel):
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2) if axis else nn.Conv2d(4, 6, 3))
    data = batches(4, 6, 6, sizes=(6,))
    converted = convert(prepared_pt2e(model, data, EveryOperator(3, per_channel, symmetric)))
    (found,) = all_converted(converted).values()
    spec = GridSpec(-4, 3, axis if per_channel else None, symmetric, torch.int8)
    grid = min_mse_grid(model[0].weight.detach(), spec)
    assert torch.equal(found.scale, grid.scale.reshape(-1))
    assert torch.equal(found.zero_point, grid.zero_point.reshape(-1))
    assert torch.equal(found.integers, grid.nearest(model[0].weight.detach()))
    assert found.axis == spec.ch_axis


@pytest.mark.parametrize("per_channel", [True, False])
def test_each_weight_is_searched_once(per_channel, monkeypatch):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 5))
    prepared = prepared_pt2e(model, batches(4, 6, 6, sizes=(6,)), EveryOperator(3, per_channel, False))
    searched: list[tuple[int, ...]] = []

    def search(weight: Tensor, spec: GridSpec) -> Grid:
        searched.append(tuple(weight.shape))
        return min_mse_grid(weight, spec)

    monkeypatch.setitem(weight_observers._GRID_OF, "mse", search)
    host = PreparedPT2E(prepared)
    assert searched == [(6, 4, 3, 3), (5, 96)]
    for node in host.nodes:
        assert same_grid(node.grid, min_mse_grid(node.weight, node.grid))


def test_groups_are_of_matrices_alone():
    with pytest.raises(InvalidOptionError, match=r"group_size: .*\(2, 2, 1, 1\) is no matrix"):
        AdaRoundGroupObserver(group_size=2)(torch.ones(2, 2, 1, 1))
    for options in ({"qscheme": torch.per_tensor_symmetric}, {"ch_axis": 1}):
        with pytest.raises(InvalidOptionError, match=r"group_size: .*per-channel qscheme and ch_axis 0"):
            AdaRoundGroupObserver(group_size=2, **options)
