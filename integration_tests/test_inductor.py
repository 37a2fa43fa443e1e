"""Learned programs in Inductor: oneDNN's kernels read the learned integers, and compute what the program computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

from integration_tests.benchmarks.server_paths import packed_integers
from integration_tests.models import batches, learn
from integration_tests.pt2e_models import all_learned, convert, prepared_pt2e, x86

pytestmark = pytest.mark.filterwarnings("ignore")  # Inductor's own, of several kinds


# else oneDNN adds products of two pairs in 16 bits, which hold 8-bit weights times 7-bit activations at most
HAS_VNNI = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_vnni", "avx_vnni"))


def small(
    *layers: nn.Module, shape: tuple[int, ...], bits: int = 4, activation_bits: int = 8
) -> tuple[fx.GraphModule, fx.GraphModule, Tensor]:
    """What was learned, its conversion, and a batch; channels in multiples of 16, as kernels want them."""
    data = batches(*shape, sizes=(6, 6))
    prepared = prepared_pt2e(
        nn.Sequential(*layers), data, x86(histogram=True, weight_bits=bits, activation_bits=activation_bits)
    )
    learned = learn(prepared, data)
    return learned, convert(learned), data[1]


def assert_close(found: Tensor, expected: Tensor) -> None:
    # a kernel that rounds one activation the other way moves the output by a small part of its spread
    assert (found - expected).abs().max() < 0.05 * expected.std()
    assert (found - expected).abs().mean() < 0.01 * expected.std()


@pytest.mark.parametrize(
    ("bits", "activation_bits"),
    [
        pytest.param(8, 8, marks=pytest.mark.skipif(not HAS_VNNI, reason="needs a processor with VNNI")),
        (8, 7),
        (4, 8),
        (2, 8),
    ],
)
def test_lowering_to_x86_keeps_the_learned_integers(bits, activation_bits):
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers = (nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), *pool, nn.Linear(16, 10))
    learned, model, batch = small(*layers, shape=(16, 6, 6), bits=bits, activation_bits=activation_bits)
    with torch.no_grad():
        expected = model(batch)
        lowered = lower_pt2e_quantized_to_x86(model, (batch,))
        assert "onednn" in lowered.code
        assert_close(lowered(batch), expected)
    found, weights = packed_integers(lowered), all_learned(learned)
    assert len(found) == len(weights) == 3
    for one, other in zip(found, weights.values(), strict=True):
        assert torch.equal(one.long(), other.integers.long())
