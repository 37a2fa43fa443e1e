"""The weight observer on its own, as torch.ao's prepare and convert use it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfig, default_observer
from torch.ao.quantization.observer import ObserverBase

from adaround_plugin.errors import AdaRoundError, InvalidModelError, InvalidOptionError
from adaround_plugin.hosts.fx.observers import AdaRoundObserver, FrozenObserver
from adaround_plugin.rounding.grid import GridSpec, integer_range
from adaround_plugin.rounding.ranges import min_max_grid, min_mse_grid

SCHEMES = {
    torch.per_tensor_symmetric: (None, True),
    torch.per_tensor_affine: (None, False),
    torch.per_channel_symmetric: (0, True),
    torch.per_channel_affine: (0, False),
}


def weight(seed: int = 0) -> Tensor:
    return torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(seed)) + 0.2


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_grid_is_that_of_the_arguments(bits, scheme):
    axis, symmetric = SCHEMES[scheme]
    observer = AdaRoundObserver(bits=bits, qscheme=scheme)
    assert observer.spec == GridSpec(*integer_range(bits), axis, symmetric, torch.qint8)
    observer(weight())
    scale, zero_point = observer.calculate_qparams()
    expected = min_mse_grid(weight(), observer.spec)
    assert torch.equal(scale, expected.scale.reshape(-1))
    assert torch.equal(zero_point, expected.zero_point.reshape(-1))
    assert scale.shape == zero_point.shape == ((1,) if axis is None else (4,))


@pytest.mark.parametrize(("method", "choose"), [("mse", min_mse_grid), ("minmax", min_max_grid)])
def test_scale_chooses_the_method(method, choose):
    observer = AdaRoundObserver(bits=3, scale=method)
    observer(weight())
    assert torch.equal(observer.calculate_qparams()[0], choose(weight(), observer.spec).scale)


def test_a_grid_goes_with_its_model_to_another_device():
    observer = AdaRoundObserver()
    observer(weight())
    frozen = FrozenObserver(observer.chosen())
    observer.to("meta")
    assert {values.device.type for values in observer.buffers()} == {"meta"}
    frozen(weight().to("meta"))
    assert {values.device.type for values in (*frozen.buffers(), *frozen.calculate_qparams())} == {"meta"}
    assert frozen.chosen().scale.device.type == "meta"
    # on a device from the start: a host may ask for one and the same everywhere
    assert {values.device.type for values in FrozenObserver(frozen.chosen()).buffers()} == {"meta"}
    assert "_weight" not in observer.state_dict()


def test_a_frozen_grid_is_that_of_the_weight_in_any_dtype():
    observer = AdaRoundObserver()
    observer(weight())
    grid = observer.chosen()
    scale, zero_point = FrozenObserver(grid).half().calculate_qparams()
    assert torch.equal(scale, grid.scale)
    assert torch.equal(zero_point, grid.zero_point)


def test_the_channel_axis_is_followed():
    observer = AdaRoundObserver(ch_axis=1)
    observer(weight())
    assert observer.calculate_qparams()[0].shape == (6,)
    assert observer.ch_axis == 1


def test_the_default_is_four_symmetric_bits_per_channel():
    observer = AdaRoundObserver()
    assert observer.spec == GridSpec(-8, 7, 0, True, torch.qint8)
    assert observer.scale_method == "mse"


def test_quant_min_and_quant_max_override_the_bits():
    observer = AdaRoundObserver(bits=4, quant_min=-7)
    assert (observer.quant_min, observer.quant_max) == (-7, 7)
    assert AdaRoundObserver(bits=8, quant_max=100).spec.quant_max == 100


def test_observing_returns_the_weight_and_only_the_last_counts():
    observer = AdaRoundObserver()
    x = weight(1)
    observer(weight(0))
    assert observer(x) is x
    assert torch.equal(observer.calculate_qparams()[0], min_mse_grid(x, observer.spec).scale)


def test_a_weight_with_gradient_is_observed_without():
    observer = AdaRoundObserver()
    observer(nn.Parameter(weight()))
    assert not observer.calculate_qparams()[0].requires_grad


@pytest.mark.parametrize("bits", [1, 9, 0, -1, 4.0, "4", None])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(InvalidOptionError, match=r"bits.*from 2 to 8"):
        AdaRoundObserver(bits=bits)


@pytest.mark.parametrize(("low", "high"), [(-129, 7), (-8, 128), (1, 7), (-8, 0), (3, 2)])
def test_a_range_that_the_dtype_cannot_hold_is_refused(low, high):
    with pytest.raises(InvalidOptionError, match="quant_min, quant_max"):
        AdaRoundObserver(quant_min=low, quant_max=high)


def test_an_unknown_scale_method_is_refused():
    with pytest.raises(InvalidOptionError, match=r"scale: 'l2'.*mse.*minmax|scale: 'l2'.*minmax.*mse"):
        AdaRoundObserver(scale="l2")


def test_a_scheme_without_integer_zero_points_is_refused():
    with pytest.raises(AdaRoundError, match="qscheme"):
        AdaRoundObserver(qscheme=torch.per_channel_affine_float_qparams)


def test_an_observer_that_saw_nothing_says_so():
    with pytest.raises(InvalidModelError, match="AdaRoundObserver: has seen no weight"):
        AdaRoundObserver().calculate_qparams()


def test_with_args_builds_independent_observers():
    build = AdaRoundObserver.with_args(bits=3, qscheme=torch.per_tensor_affine)
    first, second = build(), build()
    first(weight())
    assert first.spec == second.spec == GridSpec(-4, 3, None, False, torch.qint8)
    with pytest.raises(InvalidModelError):
        second.calculate_qparams()
    assert isinstance(QConfig(default_observer, build).weight(), AdaRoundObserver)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda observer: pickle.loads(pickle.dumps(observer))])
def test_a_copy_answers_the_same(way):
    observer = AdaRoundObserver(bits=3)
    observer(weight())
    frozen = FrozenObserver(observer.grid(weight()))
    for original in (observer, frozen):
        for a, b in zip(original.calculate_qparams(), way(original).calculate_qparams(), strict=True):
            assert torch.equal(a, b)
    changed = way(observer)
    changed(10 * weight())
    assert not torch.equal(changed.calculate_qparams()[0], observer.calculate_qparams()[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_frozen_observer_keeps_its_grid_whatever_it_sees(scheme):
    axis, symmetric = SCHEMES[scheme]
    spec = GridSpec(-4, 3, axis, symmetric, torch.qint8)
    grid = min_mse_grid(weight(), spec)
    observer = FrozenObserver(grid)
    x = 100 * weight(3)
    assert observer(x) is x
    scale, zero_point = observer.calculate_qparams()
    assert torch.equal(scale, grid.scale.reshape(-1))
    assert torch.equal(zero_point, grid.zero_point.reshape(-1))
    assert (observer.quant_min, observer.quant_max, observer.qscheme, observer.dtype) == (-4, 3, scheme, torch.qint8)
    assert observer.ch_axis == 0


def test_both_are_observers_to_torch():
    assert isinstance(AdaRoundObserver(), ObserverBase)
    assert isinstance(FrozenObserver(min_mse_grid(weight(), GridSpec(-8, 7, 0, True, torch.qint8))), ObserverBase)
