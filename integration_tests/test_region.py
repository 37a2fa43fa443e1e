"""What a region is learned from: the stream at its entry, and entries left unquantized at random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adaround_plugin.graph.paths import as_quantized
from adaround_plugin.hosts.activation_observers import AdaRoundActivationMixin
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.progress import Progress
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.regions.blocks import layer_exits, output_exits
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.learnable import WeightInit, slopes
from adaround_plugin.regions.minibatches import Minibatch
from adaround_plugin.regions.region import Drawing, Region
from integration_tests.models import batches, prepared_model


def region_of(
    net: nn.Module, layer: int, data: list[Tensor], drawing: Drawing, propagate_error: bool = True, bits: int | None = 8
) -> Region:
    """The region of one layer, both streams run up to it with the weights before it at nearest."""
    host = open_host(prepared_model(net, data, weight_bits=2, activation_bits=bits))
    arguments = [[batch] for batch in data]
    run = Pass(host, arguments, Sampling.of(arguments, 0.0, 10_000, 0), report=ReportBuilder(Progress(shown=False)))
    node = host.nodes[layer]
    with torch.no_grad():
        run.forward(run.plan([node]))
        exits = layer_exits(host, [node], activation=False)[node.name]
        return Region(run.place(), [node], exits, drawing, propagate_error=propagate_error)


@pytest.mark.parametrize("propagate_error", [True, False])
def test_errors_of_earlier_layers_are_at_the_entry_if_they_are_propagated(propagate_error: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    region = region_of(net, 1, batches(6), Drawing(), propagate_error, bits=None)
    (batch,) = region.all(held_out=False)
    with torch.no_grad():
        (output,) = batch.run([region.nodes[0].weight], [None], None)
    # on the float weight only the entry can make a difference
    assert torch.allclose(output, batch.target[0], atol=1e-5) == (not propagate_error)


def test_a_share_of_the_activations_is_left_unquantized_in_a_step() -> None:
    net = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(6))
        net[0].bias.zero_()
    region = region_of(net, 0, batches(6, sizes=(64, 64)), Drawing(batch_size=128, drop=0.25), bits=2)
    weight = region.nodes[0].weight

    def outputs(batch: Minibatch) -> tuple[Tensor, Tensor]:
        """What is computed of a batch, and of the batch without quantization."""
        with torch.no_grad():
            return batch.run([weight], [None], None)[0], batch.target[0]

    (whole,) = region.all(held_out=False)
    quantized, exact = outputs(whole)
    assert len(quantized.unique()) <= 4
    some, target = outputs(region.draw(torch.Generator().manual_seed(0)))
    # the samples of a step are in an order of their own
    row = (target[:, None] == exact[None]).all(2).long().argmax(1)
    left = (some - target).abs() < 1e-6
    assert torch.equal(some[~left], quantized[row][~left])
    assert 0.15 < float(left.float().mean()) < 0.35


def test_with_a_gradient_no_more_samples_are_taken_at_once_than_in_a_step() -> None:
    """What training on a minibatch takes is all the memory that there may be."""
    net = nn.Sequential(nn.Linear(6, 6))
    region = region_of(net, 0, batches(6, sizes=(20, 20)), Drawing(batch_size=16))
    assert [batch.samples for batch in region.all(held_out=False)] == [40]
    assert [batch.samples for batch in region.all(held_out=False, with_gradient=True)] == [16, 16, 8]
    sizes = []
    take = region._taken
    region._taken = lambda index, generator: sizes.append(len(index)) or take(index, generator)  # type: ignore[method-assign]
    node = region.nodes[0]
    integers = node.grid.nearest(node.weight)
    low, high = (torch.full_like(integers, bound) for bound in (node.grid.quant_min, node.grid.quant_max))
    init = WeightInit(
        weight=node.weight,
        grid=node.grid,
        integers=integers,
        lowest=low,
        highest=high,
        outputs=6,
        correction=None,
        moves_bias=False,
        moves_scale=False,
    )
    slopes(region, [init], ("method", "remedy"))
    assert sizes == [16, 16, 8]


@pytest.mark.parametrize("zero_point", [6, 7])
def test_middles_between_integers_go_where_the_hosts_kernel_lets_them_go(zero_point: int) -> None:
    x = (torch.arange(-20, 21) / 2).requires_grad_()
    made = torch.fake_quantize_per_tensor_affine(x, 1.0, zero_point, 0, 255)
    found = as_quantized(made, x, 1.0, zero_point, torch.quint8)
    expected = torch.quantize_per_tensor(x.detach(), 1.0, zero_point, torch.quint8).dequantize()
    assert torch.equal(found, expected)
    found.sum().backward()
    (gradient,) = torch.autograd.grad(torch.fake_quantize_per_tensor_affine(x, 1.0, zero_point, 0, 255).sum(), x)
    assert torch.equal(x.grad, gradient)
    assert gradient.unique().tolist() == [0, 1]


class Halved(nn.Module):
    """Values on a grid are quantized again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * 0.5)


@pytest.mark.parametrize("factor", [None, 1.0])
def test_a_region_computes_what_the_host_converts_to_where_values_are_quantized_twice(factor: float | None) -> None:
    torch.manual_seed(0)
    data = batches(6, sizes=(64,))
    prepared = prepared_model(Halved(), data, weight_bits=4, activation_bits=4)
    observers = [one for one in prepared.modules() if isinstance(one, AdaRoundActivationMixin)]
    # of the input, the first layer, its half, and the output: every other half lies in the middle of two integers
    for observer in observers[1:3]:
        observer.restore(0.25, 7)
    host = open_host(prepared)
    assert sum(one.scale == 0.25 for one in host.quantizers) == 2
    sampling = Sampling.of([data], 0.0, 10_000, 0)
    run = Pass(host, [data], sampling, report=ReportBuilder(Progress(shown=False)))
    region = Region(run.place(), host.nodes, output_exits(run.streams), Drawing(64), quantizers=host.quantizers)
    (batch,) = region.all(held_out=False)
    factors = None if factor is None else [torch.tensor(factor) for _ in region.quantizers]
    with torch.no_grad():
        (found,) = batch.run([node.nearest.weight for node in region.nodes], [None for _ in region.nodes], factors)
        torch.testing.assert_close(found, host.quantized_graph(*data), rtol=0, atol=1e-5)
