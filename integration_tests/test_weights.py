"""Integers of one's own choice in a prepared model: the host's conversion holds exactly these."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import MinMaxObserver, QConfig, QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from adaround_plugin import AdaRoundObserver, InvalidModelError, InvalidOptionError, get_report
from adaround_plugin.hosts.base import WeightedNode
from adaround_plugin.hosts.open import is_exported, open_host
from adaround_plugin.paper.weights import best_of_draws, round_weights, write_integers
from adaround_plugin.rounding.schemes import get_scheme
from integration_tests.models import (
    assert_same,
    assert_unchanged,
    batches,
    converted,
    learn,
    learned,
    prepared_model,
    snapshot,
)
from integration_tests.pt2e_models import all_converted, all_learned, convert, prepared_pt2e

SCHEMES = ("nearest", "floor", "ceil", "stochastic")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


class Network(nn.Module):
    """A fused convolution, a linear layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.hidden = nn.Linear(64, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.stem(x).flatten(1))))


LAYERS = ("stem.0", "hidden", "head")
DATA = batches(3, 6, 6, sizes=(6, 6))


def mapping() -> QConfigMapping:
    """4-bit weights, and activations observed without the default histogram, which takes most of a small test."""
    activation = MinMaxObserver.with_args(dtype=torch.quint8, eps=2**-12)
    return QConfigMapping().set_global(QConfig(activation, AdaRoundObserver.with_args(bits=4)))


@functools.cache
def fx_model() -> fx.GraphModule:
    torch.manual_seed(0)
    return prepared_model(Network(), DATA, mapping=mapping())


@functools.cache
def pt2e_model() -> fx.GraphModule:
    torch.manual_seed(0)
    return prepared_pt2e(Network().eval(), DATA)


HOSTS = {"fx": fx_model, "pt2e": pt2e_model}
every_host = pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)


def nodes_of(prepared: fx.GraphModule) -> list[WeightedNode]:
    """The weighted nodes, in the order of the graph."""
    return open_host(prepared).nodes


def written(model: fx.GraphModule) -> list[Tensor]:
    """The integers in a prepared model, layer by layer."""
    if is_exported(model):
        return [one.integers for one in all_learned(model).values()]
    return [learned(model, name).integers for name in LAYERS]


def held(model: fx.GraphModule) -> list[Tensor]:
    """The integers of every conversion of a prepared model, layer by layer; all conversions hold the same."""
    if is_exported(model):
        expected = all_learned(model)
        for result in (convert(model, fold_quantize=False), convert(model)):
            found = all_converted(result)
            assert found.keys() == expected.keys()
            for name, one in expected.items():
                assert_same(one, found[name])
        return [one.integers for one in expected.values()]
    expected = {name: learned(model, name) for name in LAYERS}
    for convert_copy in (convert_to_reference_fx, convert_fx):
        result = convert_copy(copy.deepcopy(model))
        for name, one in expected.items():
            assert_same(one, converted(result, name))
    return [one.integers for one in expected.values()]


@every_host
@every_scheme
def test_the_conversion_holds_what_the_scheme_says(make, scheme):
    prepared = make()
    rounded = get_scheme(scheme, seed=5)
    expected = [rounded(node.grid, node.weight) for node in nodes_of(prepared)]
    found = held(round_weights(prepared, scheme, seed=5))
    assert len(found) == len(LAYERS)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@every_host
def test_floor_stays_floor_though_nearest_is_better(make):
    prepared = make()
    low, near, high = (written(round_weights(prepared, scheme)) for scheme in ("floor", "nearest", "ceil"))
    for a, b, c in zip(low, near, high, strict=True):
        assert ((a <= b) & (b <= c)).all()
        assert ((b - a).sum() > 0) & ((c - b).sum() > 0)


@every_host
def test_layers_that_are_not_named_are_rounded_to_nearest(make):
    prepared = make()
    names = [node.name for node in nodes_of(prepared)]
    near, low = written(round_weights(prepared, "nearest")), written(round_weights(prepared, "floor"))
    one = written(round_weights(prepared, "floor", [names[1]]))
    assert [torch.equal(a, b) for a, b in zip(one, near, strict=True)] == [True, False, True]
    assert torch.equal(one[1], low[1])


def test_a_parents_name_and_a_regular_expression_select_layers():
    prepared = fx_model()
    near, low = written(round_weights(prepared, "nearest")), written(round_weights(prepared, "floor"))
    for layers, chosen in ((["stem"], [0]), (["h.*"], [1, 2]), ([], [])):
        found = written(round_weights(prepared, "floor", layers))
        for i, one in enumerate(found):
            assert torch.equal(one, low[i] if i in chosen else near[i])


def test_a_layer_without_a_qconfig_stays_in_float():
    first = mapping().set_module_name("hidden", None).set_module_name("head", None)
    prepared = prepared_model(Network(), DATA, mapping=first)
    result = convert_to_reference_fx(round_weights(prepared, "floor"))
    assert type(result.hidden) is nn.Linear
    assert torch.equal(result.hidden.weight, prepared.hidden.weight)
    assert converted(result, "stem.0").integers.unique().numel() > 2
    with pytest.raises(InvalidOptionError, match=r"hidden.*matches none"):
        round_weights(prepared, "floor", ["hidden"])
    with pytest.raises(InvalidOptionError, match=r"'hidden' cannot be rounded: left in float"):
        write_integers(prepared, {"hidden": torch.zeros(8, 64, dtype=torch.int64)})


@every_host
def test_given_integers_are_written(make):
    prepared = make()
    nodes, generator = nodes_of(prepared), torch.Generator().manual_seed(0)
    given = {
        node.name: torch.randint(-8, 8, node.weight.shape, generator=generator, dtype=torch.int32)
        for node in (nodes[0], nodes[2])
    }
    found = held(write_integers(prepared, given))
    near = written(round_weights(prepared, "nearest"))
    assert torch.equal(found[0], given[nodes[0].name].long())
    assert torch.equal(found[1], near[1])
    assert torch.equal(found[2], given[nodes[2].name].long())


@every_host
def test_the_model_given_stays_as_it_is_unless_in_place(make):
    prepared = make.__wrapped__()
    before = snapshot(prepared)
    expected = written(round_weights(prepared, "floor"))
    best_of_draws(prepared, lambda model: 0.0, 2)
    assert_unchanged(before, prepared)
    assert round_weights(prepared, "floor", inplace=True) is prepared
    for one, other in zip(written(prepared), expected, strict=True):
        assert torch.equal(one, other)


def test_weights_that_are_rounded_already_stay():
    prepared = fx_model()
    result = learn(prepared, DATA, solver="gptq")
    expected = written(result)
    again = round_weights(result, "floor")
    for one, other in zip(written(again), expected, strict=True):
        assert torch.equal(one, other)
    get_report(result)
    with pytest.raises(InvalidModelError):
        get_report(again)


def output_error(prepare: fx.GraphModule, convert_copy: Callable[[Any], Any]) -> Callable[[fx.GraphModule], float]:
    """A score: the negative squared error of the converted model against the prepared one's float weights."""
    with torch.no_grad():
        exact = copy.deepcopy(prepare)(DATA[0])

    def score(model: fx.GraphModule) -> float:
        with torch.no_grad():
            return -float((convert_copy(model)(DATA[0]) - exact).square().mean())

    return score


@pytest.mark.parametrize(
    ("make", "convert_copy"), [(fx_model, convert_to_reference_fx), (pt2e_model, convert_pt2e)], ids=HOSTS
)
def test_the_best_of_some_draws_is_the_one_with_the_highest_score(make, convert_copy):
    prepared = make()
    score = output_error(prepared, convert_copy)
    found = best_of_draws(prepared, score, 4, seed=3)
    assert len(set(found.scores)) == 4
    assert found.scores[found.best] == max(found.scores)
    assert found.scores == tuple(score(round_weights(prepared, "stochastic", seed=3 + i)) for i in range(4))
    best = round_weights(prepared, "stochastic", seed=3 + found.best)
    for one, other in zip(written(found.model), written(best), strict=True):
        assert torch.equal(one, other)


def test_draws_of_one_layer_leave_the_others_at_nearest():
    prepared = fx_model()
    found = best_of_draws(prepared, output_error(prepared, convert_to_reference_fx), 3, ["stem.0"])
    near = written(round_weights(prepared, "nearest"))
    assert [torch.equal(a, b) for a, b in zip(written(found.model), near, strict=True)] == [False, True, True]


# --- what is refused


@pytest.mark.parametrize(
    ("integers", "message"),
    [
        ({"nothing": torch.zeros(3, 8).long()}, r"'nothing' is none of \['head', 'hidden', 'stem.0'\]"),
        ({"head": torch.zeros(3, 8)}, r"'head'.*torch.float32"),
        ({"head": torch.zeros(3, 8).bool()}, r"'head'.*torch.bool"),
        ({"head": torch.zeros(8, 3).long()}, r"'head'.*shape \(8, 3\), the weight has \(3, 8\)"),
        ({"head": torch.full((3, 8), 8)}, r"'head'.*range \[-8, 7\]"),
        ({"head": torch.full((3, 8), -9)}, r"'head'.*range \[-8, 7\]"),
    ],
)
def test_integers_that_do_not_fit_are_refused(integers, message):
    with pytest.raises(InvalidOptionError, match=message):
        write_integers(fx_model(), integers)


def test_options_out_of_range_are_refused():
    prepared = fx_model()
    with pytest.raises(InvalidOptionError, match="scheme"):
        round_weights(prepared, "up")
    with pytest.raises(InvalidOptionError, match="'nothing' matches none"):
        round_weights(prepared, "floor", ["nothing"])
    with pytest.raises(InvalidOptionError, match="layers: 'head' is not a list"):
        round_weights(prepared, "floor", "head")
    with pytest.raises(InvalidOptionError, match="draws: 0"):
        best_of_draws(prepared, lambda model: 0.0, 0)
    with pytest.raises(InvalidOptionError, match="score: returned NaN"):
        best_of_draws(prepared, lambda model: float("nan"), 1)
    with pytest.raises(InvalidModelError):
        round_weights(Network(), "floor")


def test_integers_may_be_unsigned_and_are_given_once_for_tied_layers():
    values = torch.arange(24).reshape(3, 8) % 8
    written = write_integers(fx_model(), {"head": values.to(torch.uint8)})
    assert torch.equal(learned(written, "head").integers, values)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.relu(self.one(x)))

    prepared = prepared_model(Tied(), batches(4), mapping=mapping())
    zeros, ones = torch.zeros(4, 4).long(), torch.ones(4, 4).long()
    assert torch.equal(learned(write_integers(prepared, {"one": ones, "other": ones}), "other").integers, ones)
    with pytest.raises(InvalidOptionError, match="'other': are others than those of a layer that it is tied to"):
        write_integers(prepared, {"one": zeros, "other": ones})
