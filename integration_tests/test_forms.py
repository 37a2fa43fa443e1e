"""Both rounding problems of one layer, made from a prepared model of either host, solved and written back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import MinMaxObserver, QConfig, QConfigMapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.func import functional_call
from torch.nn.utils import prune

from adaround_plugin import (
    AdaRoundObserver,
    InvalidBatchError,
    InvalidOptionError,
    get_adaround_qconfig_mapping,
    get_weight_only_backend_config,
)
from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.paper.cross_entropy import CrossEntropy
from adaround_plugin.paper.forms import LayerForms
from adaround_plugin.paper.weights import write_integers
from adaround_plugin.rounding.problem import Rounding, RoundingProblem
from adaround_plugin.rounding.schemes import up_or_down
from integration_tests.models import assert_unchanged, batches, prepared_model, snapshot
from integration_tests.pt2e_models import EveryOperator, prepared_pt2e

# of one size, for which a program is exported
DATA = [(images, torch.arange(8) % 3) for images in batches(2, 6, 6, sizes=(8, 8))]
INPUTS = [images for images, _ in DATA]


class Network(nn.Module):
    """Convolutions (with batch norm and ReLU, grouped, transposed), a linear layer, and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.grouped = nn.Conv2d(4, 4, 2, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.weight = nn.Parameter(torch.randn(5, 200) * 0.1)
        self.head = nn.Linear(5, 3)
        nn.init.uniform_(self.stem[1].weight, 0.5, 1.5)
        self.stem[1].running_mean = torch.randn(4) * 0.2
        self.stem[1].running_var = torch.rand(4) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.silu(self.grouped(self.stem(x))))
        return self.head(F.silu(F.linear(x.flatten(1), self.weight)))


NAMES = ("stem.0", "grouped", "up", "weight", "head")


def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().eval()


@functools.cache
def fx_model() -> fx.GraphModule:
    activation = MinMaxObserver.with_args(dtype=torch.quint8, eps=2**-12)
    one = QConfig(activation, AdaRoundObserver.with_args(bits=3))
    # a transposed convolution on x86 takes one scale for all of its weights
    per_tensor = AdaRoundObserver.with_args(bits=3, qscheme=torch.per_tensor_symmetric)
    mapping = QConfigMapping().set_global(one).set_module_name("up", QConfig(activation, per_tensor))
    return prepared_model(network(), INPUTS, mapping=mapping)


@functools.cache
def pt2e_model() -> fx.GraphModule:
    return prepared_pt2e(network(), INPUTS, EveryOperator(weight_bits=3))


HOSTS = {"fx": fx_model, "pt2e": pt2e_model}


@functools.cache
def layer(make: Callable[[], fx.GraphModule], name: str) -> LayerForms:
    """A layer, looked up once: nothing that it is asked for changes it."""
    return LayerForms.of(make(), name)


every_host = pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)
every_layer = pytest.mark.parametrize("name", NAMES)


def task_loss(run: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The losses of a batch's samples."""
    return F.cross_entropy(run(batch[0]), batch[1], reduction="none")


def outputs(forms: LayerForms) -> Callable[[Tensor], Tensor]:
    """From a weight of the layer to the operator's outputs on its float inputs: `(positions, channels)`, no bias."""
    node, (stream, _), found = forms.node, open_streams(forms.host), []
    for x in INPUTS:
        values = stream.bind([x])
        stream.run_nodes(values, stream.runnable(set()))
        found.append(stream.value(node.sites[0].float_node.args[0], values).detach())
    x, op = torch.cat(found).double(), node.op
    if op.kind == "linear":
        return lambda weight: F.linear(x, weight)
    if op.kind == "conv_transpose":
        return lambda weight: F.conv_transpose2d(x, weight, stride=op.stride).movedim(1, -1).flatten(0, -2)
    padding = [before for before, _ in op.padding]
    return lambda weight: F.conv2d(x, weight, None, op.stride, padding, groups=op.groups).movedim(1, -1).flatten(0, -2)


def random_integers(problem: RoundingProblem, seed: int) -> Tensor:
    """A rounding up or down of every weight, as the problem lays them out."""
    bits = torch.randint(0, 2, problem.target.shape, generator=torch.Generator().manual_seed(seed)).bool()
    return torch.where(bits, problem.upper, problem.lower)


@every_host
def test_the_float_model_is_called_like_the_prepared_one_and_equals_the_network(make):
    forms = layer(make, "stem.0")
    with torch.no_grad():
        torch.testing.assert_close(forms.model(INPUTS[0]), network()(INPUTS[0]))


@every_host
@every_layer
def test_the_parameter_is_the_layers_weight(make, name):
    forms = layer(make, name)
    assert forms.node.name == name
    assert torch.equal(forms.model.get_parameter(forms.parameter), forms.node.weight)


@every_host
@every_layer
def test_the_local_form_is_the_squared_error_of_the_layers_output(make, name):
    forms = layer(make, name)
    problem, output = forms.local(INPUTS, damping=1e-12), outputs(forms)
    weight = forms.node.weight.double()
    for seed in range(3):
        q = random_integers(problem, seed)
        rounded = forms.node.grid.dequantize(forms.integers(Rounding(q, problem.loss(q)))).double()
        error = (output(rounded) - output(weight)).square().mean(0).sum()
        torch.testing.assert_close(problem.loss(q).sum(), error, rtol=1e-4, atol=0)


@every_host
@every_layer
def test_the_task_loss_form_has_the_hessian_of_the_networks_loss(make, name):
    forms = layer(make, name)
    found = forms.expand(task_loss, DATA, chunk=200)
    assert torch.equal(found.weight, forms.node.weight)

    def loss(weight: Tensor) -> Tensor:
        values = {forms.parameter: weight}
        losses = [task_loss(lambda x: functional_call(forms.model, values, (x,)), batch) for batch in DATA]
        return torch.cat(losses).mean()

    weight = found.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    value, product = torch.autograd.functional.hvp(loss, weight, direction)
    assert found.value == pytest.approx(float(value), rel=1e-5)
    expected = product.flatten().double()
    error = found.hessian @ direction.flatten().double() - expected
    assert error.norm() < 1e-4 * expected.norm()


@every_host
@every_layer
def test_the_answer_to_either_form_has_the_weights_shape(make, name):
    forms = layer(make, name)
    layout = forms.node.op.rows(forms.node.weight).shape
    for problem, shape in ((forms.local(INPUTS), layout), (forms.task_loss(task_loss, DATA, chunk=200), None)):
        assert problem.target.shape == (shape or (1, 1, forms.node.weight.numel()))
        integers = forms.integers(CrossEntropy(samples=64, iterations=5).solve(problem))
        low, high = up_or_down(forms.node.grid, forms.node.weight)
        assert ((integers == low) | (integers == high)).all()


@every_host
def test_an_answer_is_written_into_the_model(make):
    forms = layer(make, "up")
    integers = forms.integers(CrossEntropy().solve(forms.local(INPUTS)))
    assert not torch.equal(integers, forms.node.grid.nearest(forms.node.weight))
    before = learned_weights(make())
    for name, (held, _) in learned_weights(write_integers(make(), {"up": integers})).items():
        assert torch.equal(held, integers if name == "up" else before[name][0])


@every_host
def test_each_form_is_solved_best_by_its_own_answer(make):
    forms = layer(make, "stem.0")
    local, full = forms.local(INPUTS), forms.task_loss(task_loss, DATA)
    by_local, by_full = (forms.integers(CrossEntropy().solve(problem)) for problem in (local, full))
    rows = forms.node.op.rows

    def losses(integers: Tensor) -> tuple[float, float]:
        return float(local.loss(rows(integers)).sum()), float(full.loss(integers.reshape(1, 1, -1)))

    nearest = losses(forms.node.grid.nearest(forms.node.weight))
    assert losses(by_local)[0] < min(nearest[0], losses(by_full)[0])
    assert losses(by_full)[1] < min(nearest[1], losses(by_local)[1])


@every_host
def test_the_prepared_model_stays_as_it_is(make):
    prepared = make()
    before = snapshot(prepared)
    forms = LayerForms.of(prepared, "head")
    forms.local(INPUTS)
    forms.task_loss(task_loss, DATA)
    assert_unchanged(before, prepared)


def test_what_cannot_be_posed_is_refused():
    prepared = fx_model()
    with pytest.raises(InvalidOptionError, match=r"'stem' is none of"):
        LayerForms.of(prepared, "stem")
    forms = LayerForms.of(prepared, "head")
    for damping in (0.0, -1.0):
        with pytest.raises(InvalidOptionError, match="damping"):
            forms.local(INPUTS, damping=damping)
    with pytest.raises(InvalidBatchError, match="batches"):
        forms.local([])
    with pytest.raises(InvalidBatchError, match="batches"):
        forms.task_loss(task_loss, [])


def test_a_weight_that_is_computed_is_refused():
    torch.manual_seed(0)
    net = nn.Sequential(prune.identity(nn.Linear(4, 3), "weight"), nn.Linear(3, 2)).eval()
    mapping = get_adaround_qconfig_mapping(activation_bits=None)
    prepared = prepare_fx(net, mapping, (batches(4)[0],), backend_config=get_weight_only_backend_config())
    with pytest.raises(InvalidOptionError, match="the weight of '0' is no parameter of the model"):
        LayerForms.of(prepared, "0")
