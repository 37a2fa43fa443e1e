"""The activation observer on its own, as torch.ao's prepare and convert use it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts import activation_observers
from adaround_plugin.hosts.fx.observers import AdaRoundActivationObserver
from adaround_plugin.rounding.ranges import min_mse_qparams


def values(kind: str, seed: int = 0) -> Tensor:
    x = torch.randn(40, 500, generator=torch.Generator().manual_seed(seed))
    return {"relu": x.relu(), "signed": x, "shifted": x + 1.5, "tail": x.sign() * x.square() * x.abs()}[kind]


def quantization_error(x: Tensor, scale: Tensor, zero_point: Tensor, high: int) -> float:
    integers = ((x.double() / scale).round() + zero_point).clamp(0, high)
    return float(((integers - zero_point) * scale.double() - x).square().mean())


@pytest.mark.parametrize("kind", ["relu", "signed", "shifted", "tail"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_range_is_that_of_the_histogram(kind, bits):
    observer = AdaRoundActivationObserver(bits=bits)
    for seed in range(3):
        x = values(kind, seed)
        assert observer(x) is x
    scale, zero_point = observer.calculate_qparams()
    assert scale.shape == zero_point.shape == (1,)
    assert scale.dtype == torch.float32
    assert (observer.quant_min, observer.quant_max) == (0, 2**bits - 1)
    expected = min_mse_qparams(observer.histogram, float(observer.min_val), float(observer.max_val), 0, 2**bits - 1)
    assert (float(scale), int(zero_point)) == pytest.approx(expected, rel=1e-6)
    low, high = observer.bounds()
    assert low == pytest.approx(float((0 - zero_point) * scale))
    assert high == pytest.approx(float((2**bits - 1 - zero_point) * scale))


@pytest.mark.parametrize("kind", ["relu", "signed", "shifted", "tail"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_levels_err_less_than_with_the_hosts_range(kind, bits):
    top = 2**bits - 1
    ours, host = AdaRoundActivationObserver(bits=bits), HistogramObserver(quant_min=0, quant_max=top)
    error = []
    for observer in (ours, host):
        observer(values(kind))
        error.append(quantization_error(values(kind), *observer.calculate_qparams(), top))
    assert error[0] < 0.95 * error[1]


def test_zero_is_kept_exactly_and_post_relu_values_start_at_it():
    observer = AdaRoundActivationObserver(bits=4)
    observer(values("relu"))
    assert int(observer.calculate_qparams()[1]) == 0
    assert observer.bounds()[0] == 0.0


@pytest.mark.parametrize("constant", [0.0, 2.0, -3.0])
def test_a_constant_activation_is_kept(constant):
    observer = AdaRoundActivationObserver(bits=4)
    for _ in range(2):
        observer(torch.full((3, 4), constant))
    scale, zero_point = observer.calculate_qparams()
    assert scale > 0
    assert quantization_error(torch.full((1,), constant), scale, zero_point, 15) < 1e-10


def test_the_scale_has_the_hosts_floor():
    observer = AdaRoundActivationObserver(bits=4, eps=2**-12)
    observer(values("relu") * 1e-9)
    assert float(observer.calculate_qparams()[0]) == 2**-12


def test_without_data_it_says_what_the_host_says():
    with pytest.warns(UserWarning, match="must run observer"):
        scale, zero_point = AdaRoundActivationObserver().calculate_qparams()
    assert (float(scale), int(zero_point)) == (1.0, 0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda observer: pickle.loads(pickle.dumps(observer))])
def test_copies_report_the_same(duplicate):
    observer = AdaRoundActivationObserver(bits=3)
    observer(values("signed"))
    assert duplicate(observer).bounds() == observer.bounds()


def test_a_state_dict_carries_what_was_seen():
    observer, other = AdaRoundActivationObserver(bits=3), AdaRoundActivationObserver(bits=3)
    observer(values("signed"))
    other.load_state_dict(observer.state_dict())
    assert other.bounds() == observer.bounds()


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The histograms that were searched, one after the other."""
    found: list[Tensor] = []

    def search(histogram: Tensor, *range_: Any) -> tuple[float, int]:
        found.append(histogram)
        return min_mse_qparams(histogram, *range_)

    monkeypatch.setattr(activation_observers, "min_mse_qparams", search)
    return found


def test_what_was_seen_is_searched_once(searches):
    observer = AdaRoundActivationObserver(bits=3)
    observer(values("signed"))
    first = observer.calculate_qparams()
    assert observer.bounds() == copy.deepcopy(observer).bounds()
    assert observer.calculate_qparams() == first
    assert len(searches) == 1


@pytest.mark.parametrize("change", ["observe", "load", "histogram", "range"])
def test_other_values_are_searched_again(change, searches):
    observer, other = AdaRoundActivationObserver(bits=3), AdaRoundActivationObserver(bits=3)
    observer(values("signed"))
    other(values("tail"))
    observer.calculate_qparams()
    if change == "observe":
        observer(values("tail"))
    elif change == "load":
        observer.load_state_dict(other.state_dict())
    elif change == "histogram":
        observer.histogram[:100] += 50
    else:
        observer.quant_max = 15
    found = observer.calculate_qparams()
    range_ = float(observer.min_val), float(observer.max_val), 0, observer.quant_max
    expected = min_mse_qparams(observer.histogram, *range_)
    assert (float(found[0]), int(found[1])) == pytest.approx(expected, rel=1e-6)
    assert len(searches) == 2


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"dtype": torch.qint8}, "dtype"),
        ({"qscheme": torch.per_tensor_symmetric}, "qscheme"),
        ({"quant_min": -8, "quant_max": 7}, "quant_min, quant_max"),
    ],
)
def test_options_out_of_range_are_named(options, argument):
    with pytest.raises(InvalidOptionError) as caught:
        AdaRoundActivationObserver(**options)
    assert caught.value.subject == argument
