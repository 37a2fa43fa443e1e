"""Columns weighed by how much the network's output depends on them (`column_weighting="fisher"`), in FX and PT2E."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import prepare_fx
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from adaround_plugin import (
    BlockWise,
    InvalidBatchError,
    InvalidOptionError,
    LayerWise,
    Paper,
    adaround,
    get_adaround_qconfig_mapping,
    get_report,
    get_weight_only_backend_config,
)
from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.open import open_host
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.importance import OutputMoment, Sensitivity, sensitivities
from adaround_plugin.solvers import Annealing
from integration_tests.models import RECIPE
from integration_tests.region_models import Opaque

LAYERS = LayerWise(solver="gptq", **RECIPE)
FISHER = replace(LAYERS, column_weighting="fisher")


class Net(nn.Module):
    """Fused and in-place activation functions, groups, a reused layer; one logit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu = nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(inplace=True)
        self.b = nn.Conv2d(6, 6, 3, stride=2, groups=3)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        x = torch.tanh(self.b(x)).flatten(2).transpose(1, 2)
        x = self.mix(torch.relu(self.mix(x)))
        return self.head(torch.sigmoid(x).mean(1))


class HalfUnseen(nn.Module):
    """Half of what the first layer computes enters the output a hundred times less."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cat([y[:, :4], 0.01 * y[:, 4:]], dim=1).mean(1)


def data(*shape: int, seed: int = 0) -> list[Tensor]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return list(x.split(8))


def prepared_fx(net: nn.Module, batches: list[Tensor], backend=None):
    mapping = get_adaround_qconfig_mapping("x86", 2, None if backend else 8, symmetric=True)
    prepared = prepare_fx(net.eval(), mapping, (batches[0],), backend_config=backend)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return prepared


def prepared_pt2e(net: nn.Module, batches: list[Tensor]):
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(net.eval(), (batches[0],), dynamic_shapes=shapes, strict=False).module()
    prepared = prepare_pt2e(program, AdaRoundWeightOnlyQuantizer(weight_bits=2, symmetric=True))
    for batch in batches:
        prepared(batch)
    return prepared


def by_hand(net: Net, x: Tensor) -> dict[str, list[Tensor]]:
    """Squared derivative of each sample's logit by every layer's output: at each call `(N, C, positions)`."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str):
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            found.setdefault(name, []).append(output)
            # a copy, so that what works in place leaves the output as it was
            return output.clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in net.named_children() if name != "relu"]
    logits = net(x).sum()
    for handle in handles:
        handle.remove()
    layers = [output for outputs in found.values() for output in outputs]
    squares = iter(gradient.square() for gradient in torch.autograd.grad(logits, layers))
    return {name: [_channels_first(next(squares), name) for _ in outputs] for name, outputs in found.items()}


def _channels_first(square: Tensor, name: str) -> Tensor:
    if name in ("a", "b"):
        return square.flatten(2)
    return square.reshape(square.shape[0], -1, square.shape[-1]).transpose(1, 2)


@pytest.mark.parametrize("make", [prepared_fx, prepared_pt2e])
@pytest.mark.parametrize("max_columns", [10**6, 60])
def test_importance_is_the_squared_derivative(make, max_columns):
    # the projection is by signs, so that of one logit nothing is random
    batches = data(20, 2, 7, 7)
    net = Net()
    host = open_host(make(net, batches), None)
    sampling = Sampling.of([[batch] for batch in batches], 0.0, max_columns, 0)
    batch = 1
    expected = by_hand(net, batches[batch])
    stream, _ = open_streams(host)
    found = sensitivities(stream, host.nodes, sampling, batch, stream.bind([batches[batch]]))
    assert len(found) == 5
    for node in host.nodes:
        name = node.name.split(".")[0]
        for site, squares in zip(node.sites, expected[name], strict=True):
            groups = 3 if name == "b" else 1
            patches_of = {"a": 49, "b": 9, "mix": 9, "head": 1}[name]
            sample, position = _columns(sampling, batch, patches_of, node, len(squares))
            wanted = squares.unflatten(1, (groups, -1)).sum(2)[sample, :, position].T
            # (G, n)
            columns = found[site.float_node].columns
            torch.testing.assert_close(columns, wanted, rtol=1e-3, atol=1e-6 * float(wanted.max()))


def _columns(sampling, batch, positions, node, length):
    rows = node.op.rows(node.weight)

    class Shape:
        samples, row_length, groups = length, rows.shape[2], rows.shape[0]
        x = node.weight

    Shape.positions = positions
    return sampling.columns(batch, Shape, len(node.sites))


@pytest.mark.parametrize("make", [prepared_fx, prepared_pt2e])
def test_what_the_output_hardly_sees_is_given_up_for_what_it_sees(make):
    batches = data(128, 8, 12)
    # two kinds of tokens, so that one rounding cannot serve both; the one that matters less is the louder
    mix = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(1))
    batches = [torch.cat([batch[:, :4] @ mix[0], 3 * batch[:, 4:] @ mix[1]], dim=1) for batch in batches]
    prepared = make(HalfUnseen(), batches)
    error = {}
    for weighting in ("none", "fisher"):
        learned = adaround(prepared, batches, replace(LAYERS, column_weighting=weighting), progress=False)
        error[weighting] = get_report(learned).output_error
    # measured: 0.74 and 0.80
    assert error["fisher"] < 0.9 * error["none"]


class Headed(nn.Module):
    """A layer whose outputs are scores, and what is made of them."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 8), nn.Linear(8, 6), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(4 * self.b(torch.tanh(self.a(x))))


def derivatives(make: Callable[..., fx.GraphModule], head: Callable[[Tensor], Tensor]) -> list[Sensitivity]:
    """Of the two layers of a network with this head, on one batch."""
    torch.manual_seed(0)
    batches = data(8, 12)
    host = open_host(make(Headed(head), batches), None)
    stream, _ = open_streams(host)
    sampling = Sampling.of([batches], 0.0, 10**6, 0)
    found = sensitivities(stream, host.nodes, sampling, 0, stream.bind(batches))
    return [found[node.sites[0].float_node] for node in host.nodes]


def shares(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(-1, keepdim=True)


@pytest.mark.parametrize("make", [prepared_fx, prepared_pt2e])
@pytest.mark.parametrize(
    "head",
    [
        nn.Softmax(-1),
        lambda x: torch.softmax(x, -1),
        lambda x: x.softmax(-1).reshape(-1, 3, 2).flatten(1),
        lambda x: nn.functional.log_softmax(x, -1),
        torch.sigmoid,
        nn.Sequential(nn.Sigmoid(), nn.Flatten()),
    ],
)
def test_derivatives_start_before_a_last_softmax_or_sigmoid(make, head):
    for found, expected in zip(derivatives(make, head), derivatives(make, nn.Identity()), strict=True):
        torch.testing.assert_close(found.columns, expected.columns, rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", [prepared_fx, prepared_pt2e])
def test_of_shares_computed_otherwise_the_logarithm_is_derived(make):
    expected = derivatives(make, lambda x: x - x.logsumexp(-1, keepdim=True))
    for found, wanted in zip(derivatives(make, shares), expected, strict=True):
        torch.testing.assert_close(found.columns, wanted.columns, rtol=1e-3, atol=0)


@pytest.mark.parametrize("make", [prepared_fx, prepared_pt2e])
def test_what_is_joined_counts_by_its_own_spread(make):
    """Three boxes in pixels beside three probabilities: neither is drowned."""

    def head(pixels: float) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([pixels * x[:, :3], torch.sigmoid(x[:, 3:])], 1)

    expected = derivatives(make, lambda x: torch.cat([x[:, :3], x[:, 3:] + 0], 1))
    for one, other, plain in zip(derivatives(make, head(1.0)), derivatives(make, head(1000.0)), expected, strict=True):
        torch.testing.assert_close(one.columns, other.columns, rtol=1e-3, atol=0)
        torch.testing.assert_close(one.columns, plain.columns, rtol=1e-3, atol=0)


def test_products_of_derivatives_count_every_sample_alike():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 1))
    batches = data(16, 2, 6)
    host = open_host(prepared_fx(net, batches), None)
    stream, _ = open_streams(host)
    sampling = Sampling.of([[batch] for batch in batches], 0.0, 10**6, 0)
    found: dict[fx.Node, OutputMoment] = {}
    for batch, x in enumerate(batches):
        sensitivities(stream, host.nodes, sampling, batch, stream.bind([x]), found)
    (node,) = (node for node in host.nodes if node.kind != "linear" and node.op.groups == 2)
    output = net[0](torch.cat(batches))
    (by_output,) = torch.autograd.grad(net[1:](output).sum(), output)
    by_output = by_output.unflatten(1, (2, 3))  # (samples, groups, rows, positions)
    products = torch.einsum("ngrp,ngsp->ngrs", by_output, by_output)
    products /= by_output.square().sum((2, 3))[..., None, None]
    torch.testing.assert_close(found[node.sites[0].float_node].sum, products.sum(0), rtol=1e-4, atol=1e-5)


def test_rows_stay_apart_as_far_as_few_samples_know_nothing_of_them() -> None:
    generator = torch.Generator().manual_seed(0)

    def ridge(samples: int) -> float:
        """Of outputs that do as others do, and each for itself."""
        common = torch.randn(1, samples, 1, generator=generator)
        by_output = common + torch.randn(1, samples, 8, generator=generator)
        by_output /= by_output.norm(dim=2, keepdim=True)
        moment = OutputMoment(1, 8, samples, torch.device("cpu"))
        moment.add(by_output, torch.arange(samples))
        expected = moment.sum / moment.sum.diagonal(dim1=1, dim2=2).mean()
        found = moment.pooled(lambda *_: None)
        assert found is not None
        added = (found - expected)[0]
        torch.testing.assert_close(added, added[0, 0] * torch.eye(8))
        return float(added[0, 0])

    # by definition 10 rho / (1 - rho), of the samples here
    assert ridge(4096) == pytest.approx(0.2)
    assert 0.3 < ridge(64) < 4
    assert ridge(8) > 4
    assert ridge(1) > 1000


class Differences(nn.Module):
    """Only how far two outputs of the layer are apart is seen, but for a little."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.tanh(y[..., :4] - 0.9 * y[..., 4:])


@pytest.mark.parametrize("make", [prepared_fx, prepared_pt2e])
def test_groups_of_one_row_have_products_of_derivatives_and_weights_of_columns_together(make):
    net = nn.Sequential(nn.Conv1d(6, 6, 5, groups=6), nn.Tanh(), nn.Flatten(), nn.Linear(30, 2))
    batches = data(8, 6, 9)
    host = open_host(make(net, batches), None)
    stream, _ = open_streams(host)
    found: dict[fx.Node, OutputMoment] = {}
    every = sensitivities(stream, host.nodes, Sampling.of([batches], 0.0, 10**6, 0), 0, stream.bind(batches), found)
    (depthwise,) = (one for site, one in every.items() if found[site].sum.shape == (1, 6, 6))
    assert len(every) == 2
    assert depthwise.columns.shape == (6, 8 * 5)
    assert all(torch.equal(depthwise.columns[0], other) for other in depthwise.columns)
    # of each sample one of both, by the signs of its projection
    output = net[0](batches[0]).detach().requires_grad_()
    derivatives = [
        torch.autograd.grad(net[1:](output) @ torch.tensor([1.0, sign]), output, torch.ones(8))[0] for sign in (1, -1)
    ]
    expected = torch.zeros(6, 6)
    for sample, columns in enumerate(depthwise.columns[0].reshape(8, 5)):
        either = [one[sample] for one in derivatives]
        (taken,) = (one for one in either if torch.allclose(one.square().sum(0), columns, rtol=1e-3))
        expected += taken @ taken.T / taken.square().sum()
    (together,) = (one.sum[0] for one in found.values() if one.sum.shape == (1, 6, 6))
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


class Separable(nn.Module):
    """A depthwise convolution, whose channels have inputs in common, and what few outputs see of it."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv1d(4, 24, 1)
        self.depthwise = nn.Conv1d(24, 24, 9, groups=24)
        self.project = nn.Conv1d(24, 2, 1)
        for layer in (self.expand, self.project):
            # on a grid of two bits, so that they have no error of their own
            layer.weight = nn.Parameter(torch.randint(-1, 2, layer.weight.shape).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.relu(self.depthwise(torch.relu(self.expand(x)))))


@pytest.mark.parametrize("make", [prepared_fx, prepared_pt2e])
@pytest.mark.parametrize("solver", ["annealing", "gptq"])
def test_channels_of_a_depthwise_convolution_make_up_for_each_other(make, solver):
    error = {True: 0.0, False: 0.0}
    for seed in range(6):
        torch.manual_seed(seed)
        batches = data(128, 4, 12, seed=seed)
        prepared = make(Separable(), batches)
        for coupled in error:
            layers = replace(FISHER, solver=solver, output_hessian=coupled)
            learned = adaround(prepared, batches, layers, exclude=["expand", "project"], progress=False)
            report = get_report(learned)
            assert report.output_error is not None
            error[coupled] += report.output_error
    # measured: 0.7 to 0.8
    assert error[True] < 0.9 * error[False], error


@pytest.mark.parametrize("make", [prepared_fx, prepared_pt2e])
@pytest.mark.parametrize("solver", ["annealing", "gptq"])
def test_rows_make_up_for_each_other(make, solver):
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    error = {True: 0.0, False: 0.0}
    for seed in range(20):
        torch.manual_seed(seed)
        batches = [batch @ mix for batch in data(256, 12)]
        prepared = make(Differences(), batches)
        for coupled in error:
            layers = replace(FISHER, solver=solver, output_hessian=coupled)
            report = get_report(adaround(prepared, batches, layers, progress=False))
            assert report.output_error is not None
            error[coupled] += report.output_error
            assert ("output hessian" in report.recipe) == coupled
    # measured: 0.77 to 0.88
    assert error[True] < 0.9 * error[False]


def test_nothing_of_the_models_is_left_changed():
    batches = data(16, 2, 7, 7)
    prepared = prepared_fx(Net(), batches)
    before = {name: value.clone() for name, value in prepared.state_dict().items() if isinstance(value, Tensor)}
    adaround(prepared, batches, FISHER, progress=False)
    assert all(parameter.grad is None for parameter in prepared.parameters())
    assert not any(module._forward_hooks for module in prepared.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    assert all(torch.equal(prepared.state_dict()[name], value) for name, value in before.items())


class Detached(nn.Module):
    """The output has no derivative by the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.b(torch.relu(self.a(x))).detach()


def test_the_report_says_where_no_derivative_could_be_followed():
    batches = data(32, 12)
    backend = get_weight_only_backend_config()
    coupled = replace(FISHER, output_hessian=True)
    learned = adaround(prepared_fx(Detached(), batches, backend), batches, coupled, progress=False)
    assert all("alike: the network's output has no finite derivative" in one.note for one in get_report(learned).layers)
    assert all("apart: the network's output has no finite derivative" in one.note for one in get_report(learned).layers)
    learned = adaround(prepared_fx(HalfUnseen(), data(32, 8, 12)), data(32, 8, 12), FISHER, progress=False)
    assert not any("derivative" in layer.note for layer in get_report(learned).layers)


class Root(nn.Module):
    """The derivative of a square root at zero is infinite, and times zero no number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.sqrt(y * (y > 0)))


def test_derivatives_that_are_no_numbers_are_left_out_and_reported():
    batches = data(32, 12)
    prepared = prepared_fx(Root(), batches, get_weight_only_backend_config())
    learned = adaround(prepared, batches, FISHER, progress=False)
    notes = {layer.name: layer.note for layer in get_report(learned).layers}
    assert "derivative" in notes["a"]
    assert "derivative" not in notes["b"]
    blocks = BlockWise(layers=LAYERS, iterations=5, weighs_outputs=True, drop=0.0, blocks=["a", "b"])
    learned = adaround(prepared, batches, blocks, progress=False)
    notes = {block.name: block.note for block in get_report(learned).blocks}
    assert "weighed alike" in notes["a"]
    assert "weighed alike" not in notes["b"]


def test_a_batch_that_does_not_fit_is_named_as_without_weights():
    prepared = prepared_fx(HalfUnseen(), data(32, 8, 12))
    with pytest.raises(InvalidBatchError, match=r"layer 'a'.*batch 0"):
        adaround(prepared, data(32, 8, 11), FISHER, progress=False)


QUICK = BlockWise(layers=LAYERS, iterations=2, drop=0.0, weighs_outputs=False)


@pytest.mark.parametrize(
    ("method", "subject"),
    [
        (FISHER, "column_weighting, output_hessian, weighs_outputs"),
        (replace(QUICK, weighs_outputs=True, blocks=["a", "b"]), "column_weighting, output_hessian, weighs_outputs"),
        (QUICK, "method"),
        (Paper(iterations=2, start=Annealing(), activation=False), None),
    ],
)
def test_an_operator_without_a_derivative_is_an_error_with_a_remedy(method, subject):
    batches = data(32, 12)
    prepared = prepared_fx(Opaque(), batches)
    if subject is not None:
        with pytest.raises(InvalidOptionError) as caught:
            adaround(prepared, batches, method, progress=False)
        assert caught.value.subject == subject
        assert "default" in caught.value.remedy
    # what asks for no derivative by it does its work
    learned = adaround(prepared, batches, LAYERS if subject else method, progress=False)
    assert len(get_report(learned).layers) == 2


def test_the_same_call_gives_the_same_integers():
    batches = data(32, 2, 7, 7)
    prepared = prepared_fx(Net(), batches)
    texts = set()
    for _ in range(2):
        torch.rand(3)
        learned = adaround(prepared, batches, FISHER, progress=False)
        texts.add(str([layer.learned_error for layer in get_report(learned).layers]))
    assert len(texts) == 1


class TokensFirst(nn.Module):
    """Layers whose input is (tokens, samples, channels), (tokens * samples, channels), and both ways round."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.folded, self.both, self.head = (nn.Linear(6, size) for size in (6, 6, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inside(self.both(x).transpose(0, 1)))
        x = torch.tanh(self.folded(x.flatten(0, 1))).unflatten(0, (7, -1))
        return self.head(torch.tanh(self.both(x)).mean(0))


@pytest.mark.parametrize("sizes", [[16, 16], [5, 16], [16, 5]])
@pytest.mark.parametrize("size", [16, 5])
def test_columns_of_pieces_are_not_taken_for_those_of_the_whole(monkeypatch, sizes, size):
    """Where the leading axis is not that of the samples, a piece of a batch has other columns than the batch."""
    monkeypatch.setattr("adaround_plugin.learning.column_weights.piece_size", lambda *_: size)
    x = torch.randn(sum(sizes), 7, 6, generator=torch.Generator().manual_seed(0))
    batches = list(x.split(sizes))
    report = get_report(adaround(prepared_fx(TokensFirst(), batches), batches, FISHER, progress=False))
    cut = {layer.name for layer in report.layers if "leading axis" in layer.note}
    assert cut == (set() if size == 16 else {"inside", "folded", "both"})
    assert not [layer.note for layer in report.layers if "derivative" in layer.note]


@pytest.mark.parametrize("make", [prepared_fx, prepared_pt2e])
def test_excluded_layers_are_not_differentiated(make, monkeypatch):
    seen = set()
    build = OutputMoment.__init__

    def counted(self, groups, rows, *args):
        seen.add(rows)
        build(self, groups, rows, *args)

    monkeypatch.setattr(OutputMoment, "__init__", counted)
    batches = list(torch.randn(32, 7, 6, generator=torch.Generator().manual_seed(0)).split(8))
    method = replace(FISHER, output_hessian=True)
    adaround(make(TokensFirst(), batches), batches, method, exclude=["inside", "folded", "both"], progress=False)
    assert seen == {3}


def test_a_group_without_derivatives_leaves_the_others_theirs() -> None:
    by_output = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(0))
    by_output[1] = 0
    both, alone = (OutputMoment(groups, 4, 40, torch.device("cpu")) for groups in (2, 1))
    both.add(by_output, torch.arange(40))
    alone.add(by_output[:1], torch.arange(40))
    found, expected = (moment.pooled(lambda *_: None) for moment in (both, alone))
    assert found is not None
    assert expected is not None
    off = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(found[0][off], expected[0][off])
    assert torch.equal(found[1], found[1, 0, 0] * torch.eye(4))
    assert found[1, 0, 0] > 0
    assert OutputMoment(2, 4, 40, torch.device("cpu")).pooled(lambda *_: None) is None
