"""Scales that equalize ranges: the fixed point, the product they keep, and what is left alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adaround_plugin.equalization.channel_scales import Link, balance, kernels, level
from adaround_plugin.graph.operators import module_op
from adaround_plugin.rounding.linear_op import LinearOp

SETTINGS: dict[str, Any] = {"iterations": 1000, "tolerance": 1e-12, "limit": math.inf}


def random_layer(generator: torch.Generator, groups: int, outputs: int, inputs: int) -> Tensor:
    """Magnitudes over several decades, different for each channel."""
    found = torch.rand((groups, outputs, inputs), generator=generator, dtype=torch.float64)
    return found * torch.exp(3 * torch.randn((groups, outputs, inputs), generator=generator, dtype=torch.float64))


@st.composite
def chains(draw: st.DrawFn) -> list[Tensor]:
    """Two to five layers, of which each takes the channels that the one before it makes; some are depthwise."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    channels = draw(st.integers(1, 6))
    layers = [random_layer(generator, 1, channels, draw(st.integers(1, 4)))]
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            layers.append(random_layer(generator, channels, 1, 1))
        else:
            outputs = draw(st.integers(1, 6))
            layers.append(random_layer(generator, 1, outputs, channels))
            channels = outputs
    return layers


def in_a_row(layers: list[Tensor]) -> list[Link]:
    return [Link(i, i + 1) for i in range(len(layers) - 1)]


@given(chains())
def test_ranges_are_equal_when_converged(layers):
    found = balance(layers, in_a_row(layers), **SETTINGS)
    assert found.converged
    for first, second in found.after:
        torch.testing.assert_close(first, second, rtol=1e-9, atol=0)


@given(chains())
def test_the_scales_explain_the_ranges(layers):
    found = balance(layers, in_a_row(layers), **SETTINGS)
    scaled = [layer.clone() for layer in layers]
    for i, scale in enumerate(found.scales):
        scaled[i] /= scale.reshape(scaled[i].shape[0], -1, 1)
        scaled[i + 1] *= scale.reshape(scaled[i + 1].shape[0], 1, -1)
    for i, (first, second) in enumerate(found.after):
        torch.testing.assert_close(scaled[i].amax(2).flatten(), first)
        torch.testing.assert_close(scaled[i + 1].amax(1).flatten(), second)


@given(chains())
def test_one_pair_has_the_formula_of_the_paper(layers):
    first, second = layers[0].amax(2).flatten(), layers[1].amax(1).flatten()
    found = balance(layers[:2], [Link(0, 1)], **SETTINGS)
    torch.testing.assert_close(found.scales[0], (first * second).sqrt() / second)
    torch.testing.assert_close(found.before[0], (first, second))
    torch.testing.assert_close(found.after[0][0], (first * second).sqrt())
    # the second sweep finds nothing left to do
    assert found.iterations == 2


def test_layers_are_not_changed():
    generator = torch.Generator().manual_seed(0)
    layers = [random_layer(generator, 1, 3, 2), random_layer(generator, 1, 2, 3)]
    before = [layer.clone() for layer in layers]
    balance(layers, [Link(0, 1)], **SETTINGS)
    assert all(torch.equal(one, other) for one, other in zip(layers, before, strict=True))


def test_pointwise_depthwise_pointwise_meet_in_the_cube_root():
    pointwise, depthwise = torch.tensor([[[8.0], [1.0]]]).double(), torch.tensor([[[1.0]], [[64.0]]]).double()
    found = balance([pointwise, depthwise, torch.ones(1, 1, 2).double()], [Link(0, 1), Link(1, 2)], **SETTINGS)
    for first, second in found.after:
        # (8 * 1 * 1)^(1/3) and (1 * 64 * 1)^(1/3)
        torch.testing.assert_close(first, torch.tensor([2.0, 4.0]).double())
        torch.testing.assert_close(second, torch.tensor([2.0, 4.0]).double())


@pytest.mark.parametrize("dead", ["first", "second", "both"])
def test_a_channel_without_weight_keeps_its_scale(dead):
    first, second = torch.full((1, 2, 3), 4.0).double(), torch.ones(1, 3, 2).double()
    if dead != "second":
        first[:, 1] = 0
    if dead != "first":
        second[:, :, 1] = 0
    found = balance([first, second], [Link(0, 1)], **SETTINGS)
    assert found.scales[0].tolist() == [2.0, 1.0]
    assert found.converged


def test_flattened_positions_share_the_scale_of_their_channel():
    first = torch.tensor([[[1.0], [1.0]]]).double()
    second = torch.tensor([[[1.0, 4.0, 1.0, 0.0, 0.0, 1 / 16]]]).double()
    found = balance([first, second], [Link(0, 1, repeat=3)], **SETTINGS)
    assert found.scales[0].tolist() == [0.5, 4.0]
    assert found.after[0][0].tolist() == found.after[0][1].tolist() == [2.0, 0.25]


def test_scales_stay_within_the_limit():
    first, second = torch.tensor([[[1e-8], [4.0], [1e8]]]).double(), torch.ones(1, 1, 3).double()
    found = balance([first, second], [Link(0, 1)], iterations=50, tolerance=1e-3, limit=100.0)
    torch.testing.assert_close(found.scales[0], torch.tensor([0.01, 2.0, 100.0]).double())
    assert found.converged


def test_sweeps_that_do_not_suffice_are_told():
    generator = torch.Generator().manual_seed(1)
    layers = [random_layer(generator, 4, 1, 1) for _ in range(4)]
    found = balance(layers, in_a_row(layers), iterations=1, tolerance=1e-6, limit=math.inf)
    assert found.iterations == 1
    assert not found.converged


def ranges_between(layers: list[Tensor], seed: int) -> list[Tensor]:
    """`(channels,)` over several decades, for each two neighbouring layers."""
    generator = torch.Generator().manual_seed(seed)
    counts = [layer.shape[0] * layer.shape[1] for layer in layers[:-1]]
    return [torch.exp(3 * torch.randn(count, generator=generator, dtype=torch.float64)) for count in counts]


@given(chains(), st.integers(0, 2**16))
def test_leveled_activations_have_one_range(layers, seed):
    ranges = ranges_between(layers, seed)
    found = level(layers, in_a_row(layers), ranges, math.inf)
    assert (found.iterations, found.converged) == (1, True)
    scaled = [layer.clone() for layer in layers]
    for i, scale in enumerate(found.scales):
        torch.testing.assert_close(ranges[i] / scale, ranges[i].median().expand(len(scale)))
        scaled[i] /= scale.reshape(scaled[i].shape[0], -1, 1)
        scaled[i + 1] *= scale.reshape(scaled[i + 1].shape[0], 1, -1)
    for i, scale in enumerate(found.scales):
        torch.testing.assert_close(found.before[i], (ranges[i], layers[i + 1].amax(1).flatten()))
        torch.testing.assert_close(found.after[i], (ranges[i] / scale, scaled[i + 1].amax(1).flatten()))


@given(chains(), st.integers(0, 2**16))
def test_no_other_scales_let_less_of_the_rounded_activations_through(layers, seed):
    (ranges, *_), second = ranges_between(layers, seed), layers[1]
    (scale, *_) = level(layers[:2], [Link(0, 1)], [ranges], math.inf).scales

    def error(scale: Tensor) -> Tensor:
        step = (ranges / scale).max()
        return step**2 / 12 * (second * scale.reshape(second.shape[0], 1, -1)).square().sum()

    generator = torch.Generator().manual_seed(seed)
    for spread in (0.01, 0.1, 1.0):
        other = scale * torch.exp(spread * torch.randn(len(scale), generator=generator, dtype=torch.float64))
        assert error(scale) <= error(other) * (1 + 1e-12)


def test_leveling_leaves_channels_without_activations_and_keeps_the_limit():
    layers = [torch.ones(1, 4, 2).double(), torch.ones(1, 3, 4).double()]
    ranges = torch.tensor([0.0, 2.0, 1e-6, 1e9]).double()
    found = level(layers, [Link(0, 1)], [ranges], 100.0)
    assert found.scales[0].tolist() == [1.0, 1.0, 0.01, 100.0]
    assert all(torch.equal(layer, torch.ones_like(layer)) for layer in layers)
    assert level(layers, [Link(0, 1)], [torch.zeros(4).double()], 100.0).scales[0].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 4),
        nn.Conv1d(6, 4, 3),
        nn.Conv2d(6, 4, (3, 2), groups=2),
        nn.Conv3d(6, 6, 2, groups=6),
        nn.ConvTranspose1d(6, 4, 3),
        nn.ConvTranspose2d(6, 4, (2, 3), groups=2),
    ],
    ids=lambda module: f"{type(module).__name__}-{getattr(module, 'groups', 1)}",
)
def test_kernels_are_what_joins_an_input_to_an_output(module):
    op = module_op(module)
    assert isinstance(op, LinearOp)
    found = kernels(module.weight, op)
    groups, outputs, inputs, _ = found.shape
    assert torch.equal(op.unrows(found.flatten(2), module.weight.shape).float(), module.weight)
    # with weights that are all positive, an input reaches just the outputs of its group, by the sum over its kernel
    nn.init.uniform_(module.weight)
    found = kernels(module.weight, op)
    spatial = (1,) * (module.weight.dim() - 2) if op.kind == "conv_transpose" else module.weight.shape[2:]
    for i in range(groups * inputs):
        x = torch.zeros(1, groups * inputs, *spatial)
        x[0, i] = 1
        nn.init.zeros_(module.bias)
        reached = module(x).detach()[0].flatten(1).sum(1) if op.kind != "linear" else module(x).detach()[0]
        expected = torch.zeros(groups, outputs)
        expected[i // inputs] = found[i // inputs, :, i % inputs].sum(1).float()
        torch.testing.assert_close(reached, expected.flatten())
