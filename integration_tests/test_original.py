"""The float model beside the prepared one: what a host got wrong is named before anything is learned."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import weight_norm
from torch.utils._pytree import tree_leaves

from adaround_plugin import InvalidModelError, InvalidOptionError
from integration_tests import models, pt2e_models
from integration_tests.models import (
    assert_equal_trees,
    assert_unchanged,
    batches,
    conv,
    learn,
    prepared_model,
    snapshot,
)
from integration_tests.pt2e_models import prepared_pt2e

SHAPE = (4, 6, 6)
Prepare = Callable[[nn.Module, list[Any]], fx.GraphModule]
# what is shared or called as a function is found in strict programs only
HOSTS: dict[str, Prepare] = {"fx": prepared_model, "pt2e": functools.partial(prepared_pt2e, strict=True)}


def data_of(*shape: int) -> list[Tensor]:
    return batches(*shape, sizes=(6, 6))


def norm() -> nn.BatchNorm2d:
    """A batch norm that does something."""
    result = nn.BatchNorm2d(4)
    result.running_mean, result.running_var = torch.randn(4), torch.rand(4) + 0.3
    return result


class Shared(nn.Module):
    """A convolution that is called twice, with a batch norm behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.norm, self.other = conv(), conv(), norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.shared(torch.relu(self.norm(self.shared(self.first(x))))))


class OtherNorm(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.shared(torch.relu(self.norm(self.shared(self.first(x))))))


class ByKeyword(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(input=self.shared(torch.relu(self.norm(input=self.shared(self.first(x))))))


class OnceWithout(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.norm(self.shared(self.first(x)))))


class Written(nn.Module):
    """An in-place operation whose result is not used, on a value that is read later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.relu_()
        return self.b(y)


class PartWritten(Written):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 0] = 0.5
        return self.b(y)


class WrittenTwice(Written):
    """Writes that the hosts keep: results are used, or read by what is not quantized."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).mul_(2.0)
        y = y.add_(1.0)
        return self.b(y.relu_())


def refused(prepared: fx.GraphModule, data: list[Any], float_model: nn.Module, match: str) -> None:
    """`adaround` refuses, and leaves both models and the data as they were."""
    before = snapshot(prepared), snapshot(float_model), copy.deepcopy(data)
    training, hooks = float_model.training, [len(module._forward_hooks) for module in float_model.modules()]
    with pytest.raises(InvalidModelError, match=match) as caught:
        learn(prepared, data, float_model=float_model)
    assert caught.value.remedy.endswith(".")
    assert_unchanged(before[0], prepared)
    assert_unchanged(before[1], float_model)
    assert_equal_trees(data, before[2])
    assert float_model.training == training
    assert [len(module._forward_hooks) for module in float_model.modules()] == hooks


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", [OtherNorm, OnceWithout])
def test_a_batch_norm_folded_into_a_shared_convolution_is_named(kind, host):
    model, data = kind().eval(), data_of(*SHAPE)
    prepared = HOSTS[host](model, data)
    match = r"prepared: its float graph differs from float_model .*folds a batch norm into layer 'shared'"
    refused(prepared, data, model, match)


def test_a_batch_norm_that_is_called_by_keyword_is_found_too():
    model, data = ByKeyword().eval(), data_of(*SHAPE)
    refused(HOSTS["pt2e"](model, data), data, model, "folds a batch norm into layer 'shared'")


@pytest.mark.parametrize("host", HOSTS)
def test_the_same_batch_norm_behind_each_call_is_none(host):
    model, data = Shared().eval(), data_of(*SHAPE)
    assert learn(HOSTS[host](model, data), data, solver="gptq", float_model=model)


@pytest.mark.parametrize(
    ("host", "kind", "match"),
    [
        ("fx", Written, "node 'relu_': writes to a value in place.*'b' reads what was before.*out of place"),
        ("pt2e", PartWritten, "node 'fill_'|node 'copy_': writes to a value .*'conv2d_1' reads what was before"),
    ],
)
def test_a_write_that_conversion_loses_is_named(host, kind, match):
    model, data = kind().eval(), data_of(*SHAPE)
    refused(HOSTS[host](model, data), data, model, match)


@pytest.mark.parametrize(("host", "kind"), [("fx", WrittenTwice), ("pt2e", WrittenTwice), ("pt2e", Written)])
def test_writes_that_conversion_keeps_are_none(host, kind):
    model, data = kind().eval(), data_of(*SHAPE)
    assert learn(HOSTS[host](model, data), data, solver="gptq", float_model=model)


@pytest.mark.parametrize("host", HOSTS)
def test_another_model(host):
    model, data = Shared().eval(), data_of(*SHAPE)
    prepared = HOSTS[host](copy.deepcopy(model), data)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.first.weight.mul_(1.1)
    refused(prepared, data, other, r"prepared: .*made of another model, or.*prepare step changes")
    wider = nn.Sequential(conv(4, 5))
    with pytest.raises((InvalidModelError, TypeError)):
        learn(prepared, data, float_model=wider)


# FX drops in-place methods whose results are not used, and reads what it quantized before a write
_LOST_BY_FX = {"InplaceThenRead", "Inplace", "IndexFill", *(kind.__name__ for kind in models.ALIASED)}


@pytest.mark.parametrize("name", [name for name in models.net_names(aliases=True) if name != "Standalone"])
def test_every_net_of_fx_is_what_was_prepared(name):
    model, prepared, data = models.prepared_net(name)
    model.train()
    if name in _LOST_BY_FX:
        refused(prepared, data, model, "in place, and the host's conversion loses that")
        return
    before = snapshot(model)
    assert learn(prepared, data, solver="nearest", float_model=model)
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["Keywords", "DictArgument", "DictOutput", "PairsByName", "Attention", "MaskAssigned"])
def test_nets_of_pt2e_are_what_was_prepared(name):
    model, _, _ = pt2e_models.exported_net(name)
    prepared, data = pt2e_models.prepared_net(name)
    assert tree_leaves(data)
    assert learn(prepared, data, solver="nearest", float_model=model)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_a_float_model_that_torch_does_not_copy():
    with torch.no_grad():
        model = nn.Sequential(weight_norm(nn.Conv2d(4, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    data = data_of(*SHAPE)
    prepared = prepared_model(model, data)
    model(data[0])
    assert not model[0].weight.is_leaf
    assert learn(prepared, data, solver="gptq", float_model=model)


def test_what_is_no_model_or_returns_nothing_to_compare():
    model, data = Shared().eval(), data_of(*SHAPE)
    prepared = prepared_model(model, data)
    with pytest.raises(InvalidOptionError, match=r"(?s)float_model.*no module.*Pass the model"):
        learn(prepared, data, float_model=model.forward)

    class Decided(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    model = Decided().eval()
    with pytest.raises(InvalidOptionError, match="float_model: returns no floating-point values"):
        learn(prepared_model(model, data), data, float_model=model)


def test_an_error_of_the_float_model_keeps_its_type():
    model, data = Shared().eval(), data_of(*SHAPE)
    prepared = prepared_model(copy.deepcopy(model), data)
    model.first = nn.Conv2d(3, 4, 3)
    with pytest.raises(RuntimeError, match="channels") as caught:
        learn(prepared, data, float_model=model)
    assert "while running float_model on the first batch" in caught.value.__notes__


@pytest.mark.parametrize("host", HOSTS)
def test_a_value_that_is_returned_twice_is_compared_twice(host):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.conv(x)
            return y, x + y, y

    model, data = Twice().eval(), data_of(*SHAPE)
    learn(HOSTS[host](model, data), data, float_model=model)
