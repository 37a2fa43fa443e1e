"""The paper preset beside an independent implementation of the paper's equations, on a network trained here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaround_plugin import demo
from integration_tests.benchmarks.paper_preset import by_hand, by_preset, rounded_to_nearest

BITS, ITERATIONS, RATE = 2, 300, 2e-2


@pytest.fixture(scope="module")
def digits() -> demo.Digits:
    return demo.load()


@pytest.fixture(scope="module")
def model(digits: demo.Digits) -> nn.Module:
    return demo.train(demo.network(), digits, epochs=8)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_paper_preset_learns_the_integers_of_an_independent_implementation(
    digits: demo.Digits, model: nn.Module, seed: int
) -> None:
    """Where scales, minibatches and the units of lambda are the same, so are the integers.

    Not one by one: sums come out in another order, and a gradient near zero moves Adam as far as any other.
    """
    images = digits.images[:256]
    (ours,) = by_preset(model, BITS, list(images.split(64)), ITERATIONS, RATE, [seed])
    learned = [module.get_quantized_weight() for module in ours.modules() if hasattr(module, "get_quantized_weight")]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    scales = {name: one.q_scale() for name, one in zip(names, learned, strict=True)}
    (theirs,) = by_hand(model, BITS, images, ITERATIONS, RATE, [seed], scales=scales, relative=True)
    nearest = rounded_to_nearest(model, BITS)
    for name, one in zip(names, learned, strict=True):
        other = torch.round(theirs.get_submodule(name).weight / scales[name]).long()
        plain = torch.round(nearest.get_submodule(name).weight / scales[name]).long()
        assert float((one.int_repr() != other).float().mean()) < 0.01
        assert float((other != plain).float().mean()) > 0.1
    accuracies = [demo.accuracy(one, digits) for one in (ours, theirs)]
    assert demo.accuracy(nearest, digits) < min(accuracies) - 5
