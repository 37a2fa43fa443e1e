"""The formulas of the plan say what the package does, and what is known of the networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.rounding.linear_op import LinearOp
from adaround_plugin.rounding.moments import Moments
from integration_tests.benchmarks.plan import NETWORKS, Layer, convolutional, transformer


def test_moments_and_columns_are_those_of_the_package() -> None:
    layer = Layer(1, 1, 10, 32, 1)
    assert layer.moments == Moments.bytes(1, 10, 32)
    wide = Layer(1, 1, 4, 6000, 1)
    for one in (layer, wide):
        weight, sampling = torch.zeros(one.rows, one.columns), Sampling.of([[torch.zeros(40_000, 1)]], 0, 16384, 0)
        patches = LinearOp("linear").patches(torch.zeros(1, 1).expand(40_000, one.columns), weight.shape)
        taken = sampling.columns(0, patches, 1)[0]
        assert len(taken) == pytest.approx(one.taken, rel=0.05)


def test_a_residual_network_has_the_operations_and_weights_that_are_known_of_it() -> None:
    network = convolutional("resnet50", 1)
    assert network.total("count") == 54
    assert network.weights == 25_557_032
    # 4.09 G multiply-accumulates
    assert network.total("multiply") == pytest.approx(2 * 4.09e9, rel=0.01)
    # in the first block what its shortcut gives, and the input of its second layer
    assert network.values == 56 * 56 * (256 + 64)
    assert convolutional("resnet50", 1, bits=8).value_bytes == network.value_bytes * 5 // 8


def test_transformers_have_the_weights_that_are_known_of_them() -> None:
    assert [network.weights / 1e6 for network in NETWORKS] == pytest.approx([60.2, 632.0, 70_554], rel=0.003)
    small = transformer("small", 2, 3, 8, 16, 5)
    model = nn.ModuleList([nn.TransformerEncoderLayer(8, 1, 16, bias=False) for _ in range(3)])
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    assert small.weights == sum(weight.numel() for weight in matrices)
    assert small.total("multiply") == 2 * 5 * small.weights
