"""Modules that compute their weights: learned where the host converts them, else skipped with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from adaround_plugin import BlockWise, adaround, get_report
from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.fx.host import PreparedFX
from integration_tests.models import (
    arguments_of,
    assert_equal_trees,
    assert_same,
    assert_unchanged,
    batches,
    converted,
    learn,
    learned,
    prepared_model,
    run_stream,
    snapshot,
)

SHAPE = (4, 6, 6)
Wrap = Callable[[nn.Module], nn.Module]
PARAMETRIZATIONS: dict[str, Wrap] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
HOOKS: dict[str, Wrap] = {
    "hook of weight_norm": weight_norm,
    "hook of spectral_norm": spectral_norm,
    "hook of pruning": lambda module: prune.l1_unstructured(module, "weight", 0.3),
}
pytestmark = pytest.mark.filterwarnings("ignore:.torch.nn.utils.(weight|spectral)_norm. is deprecated:FutureWarning")


class Net(nn.Module):
    """A convolution that is called twice, and a linear layer, both computing their weights."""

    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.conv, self.relu = wrap(nn.Conv2d(4, 4, 3, padding=1)), nn.ReLU()
        self.linear, self.last = wrap(nn.Linear(144, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(self.relu(self.conv(x))))
        return self.last(self.linear(x.flatten(1)))


def prepared_net(wrap: Wrap) -> tuple[nn.Module, Any, list[Tensor]]:
    torch.manual_seed(0)
    model, data = Net(wrap), batches(*SHAPE)
    with torch.no_grad():
        for _ in range(3):
            model(data[0])  # the power iterations of spectral norms
    return model.eval(), prepared_model(model, data), data


@pytest.mark.parametrize("name", [*PARAMETRIZATIONS, *HOOKS])
def test_what_the_host_converts_is_learned_exactly_and_nothing_else_changes(name):
    model, prepared, data = prepared_net({**PARAMETRIZATIONS, **HOOKS}[name])
    floats, state = snapshot(model), snapshot(prepared)
    result = learn(prepared, data)
    assert_unchanged(floats, model)
    assert_unchanged(state, prepared)
    assert parametrize.is_parametrized(prepared.conv[0]) == (name in PARAMETRIZATIONS)
    report = get_report(result)
    # the host converts what is fused, and what a hook computes
    expected = ["conv", "last"] if name in PARAMETRIZATIONS else ["conv", "linear", "last"]
    assert [layer.name for layer in report.layers] == expected
    assert all(layer.learned_error <= layer.nearest_error for layer in report.layers)
    reference = convert_to_reference_fx(copy.deepcopy(result))
    native = convert_fx(copy.deepcopy(result))
    for layer in expected:
        assert_same(converted(reference, layer), learned(result, layer))
        assert torch.equal(converted(native, layer).integers, learned(result, layer).integers)
    if name in PARAMETRIZATIONS:
        ((skipped, _, reason),) = report.skipped
        assert skipped == "linear"
        assert reason.startswith("left in float by the host while its weight has a parametrization")
    with torch.no_grad():
        assert torch.isfinite(result(data[0])).all()


@pytest.mark.parametrize("name", [*PARAMETRIZATIONS, *HOOKS])
def test_streams_equal_the_hosts_models(name):
    model, prepared, data = prepared_net({**PARAMETRIZATIONS, **HOOKS}[name])
    for stage in (prepared, learn(prepared, data, solver="gptq")):
        exact, quantized = open_streams(PreparedFX(stage))
        reference = convert_to_reference_fx(copy.deepcopy(stage))
        with torch.no_grad():
            assert_equal_trees(run_stream(quantized, arguments_of(stage, data[0])), reference(data[0]))
            assert_equal_trees(run_stream(exact, arguments_of(stage, data[0])), stage(data[0]))
            if stage is prepared:
                assert_equal_trees(run_stream(exact, arguments_of(stage, data[0])), model(data[0]))


@pytest.mark.parametrize("name", ["weight_norm", "hook of weight_norm"])
def test_blocks_are_learned_on_other_weights(name):
    _, prepared, data = prepared_net({**PARAMETRIZATIONS, **HOOKS}[name])
    result = adaround(prepared, data, BlockWise(iterations=5), progress=False)
    assert_same(converted(convert_to_reference_fx(copy.deepcopy(result)), "conv"), learned(result, "conv"))


def test_a_weight_that_a_hook_computed_with_a_gradient():
    _, prepared, data = prepared_net(weight_norm)
    prepared(data[0])
    assert not prepared.linear.weight.is_leaf
    result = learn(prepared, data, solver="gptq")
    assert [layer.name for layer in get_report(result).layers] == ["conv", "linear", "last"]


def test_in_place_leaves_plain_weights():
    _, prepared, data = prepared_net(parametrizations.weight_norm)
    result = learn(prepared, data, solver="gptq", inplace=True)
    assert result is prepared
    assert not parametrize.is_parametrized(result.conv[0])
    found = learned(copy.deepcopy(result), "conv")
    assert_same(converted(convert_to_reference_fx(result), "conv"), found)
