"""What enters a layer's moments: columns of both streams, learning and held-out samples apart, each by its weight."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning.columns import Columns, LayerMoments
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.progress import Progress
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.importance import tempered
from adaround_plugin.rounding.moments import Moments
from adaround_plugin.rounding.shrinkage import SampleSpread
from integration_tests.models import batches, learn, learned, prepared_model

TOKENS = 5


@functools.cache
def streams() -> tuple[Pass, Tensor, Tensor]:
    """A pass with all weights at nearest, and the inputs of the second layer: float, and behind the first one's weight.

    Each is `(samples, tokens, columns)`.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    data = batches(TOKENS, 6)
    prepared = prepared_model(net, data, weight_bits=2, activation_bits=None)
    host, arguments = open_host(prepared), [[batch] for batch in data]
    run = Pass(host, arguments, Sampling.of(arguments, 0.25, 10_000, 0), report=ReportBuilder(Progress(shown=False)))
    first = learned(learn(prepared, data, "nearest", correct_bias=False), "0")
    assert first.bias is not None
    every = torch.cat(data)
    with torch.no_grad():
        exact = net[1](net[0](every))
        quantized = net[1](nn.functional.linear(every, first.dequantize(), first.bias))
    return run, exact, quantized


def gathered(weighting: str, samples: int | None = None) -> LayerMoments:
    """The moments of the second layer."""
    run, _, _ = streams()
    node = run.host.nodes[1]
    columns, moments = Columns(run, weighting), LayerMoments(node, weighting, samples)
    with torch.no_grad():
        run.look_ahead(lambda batch, values: columns.gather(node, batch, values, moments))
    return moments


def weights(exact: Tensor, weighting: str) -> Tensor:
    """`(samples, tokens)`: one over the norm, which is floored at a hundredth of its mean in the sample."""
    if weighting == "none":
        return torch.ones(exact.shape[:2])
    power = exact.square().sum(2)
    return 1 / (power + 0.01 * power.mean(1, keepdim=True))


@pytest.mark.parametrize("weighting", ["none", "inverse_norm"])
@pytest.mark.parametrize("held_out", [False, True])
def test_moments_are_those_of_both_streams_on_their_samples(weighting: str, held_out: bool) -> None:
    run, exact, quantized = streams()
    node, sampling = run.host.nodes[1], run.sampling
    held = torch.cat([sampling.held_out(batch, size) for batch, size in enumerate(sampling.size)])
    assert 0 < int(held.sum()) < len(held)
    assert not torch.allclose(exact, quantized, atol=0.1)
    chosen = held == held_out
    x_float, x = (values[chosen].flatten(0, 1).double() for values in (exact, quantized))
    share = weights(exact, weighting)[chosen].flatten().double()
    share /= share.sum()
    deviation = (x_float - x) @ node.weight.double().T
    mean = share @ x
    moments = gathered(weighting)
    found = moments.holdout if held_out else moments.learning
    moments.finish(node)
    assert found.count == int(chosen.sum()) * TOKENS
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(node.weight.shape, generator=generator).double().unsqueeze(0)
    residual = deviation + x @ change[0].T
    torch.testing.assert_close(found.error(change)[0], share @ residual.square(), rtol=1e-3, atol=1e-5)
    offset = torch.randn(1, len(node.weight), generator=generator).double()
    torch.testing.assert_close(
        found.error(change, offset)[0], share @ (residual - offset).square(), rtol=1e-3, atol=1e-5
    )
    if isinstance(found, Moments):
        torch.testing.assert_close(found.mean[0], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.deviation[0], share @ deviation, rtol=1e-4, atol=1e-5)
        spread = (x - mean).T @ (share[:, None] * (x - mean))
        torch.testing.assert_close(found.hessian[0], spread, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighting", ["none", "inverse_norm"])
def test_damping_is_what_the_learning_samples_ask_for(weighting: str) -> None:
    run, exact, quantized = streams()
    sampling, samples = run.sampling, sum(run.sampling.size)
    held = torch.cat([sampling.held_out(batch, size) for batch, size in enumerate(sampling.size)])
    x, weight = quantized[~held].flatten(0, 1).unsqueeze(0), weights(exact, weighting)[~held].flatten().unsqueeze(0)
    spread, moments = SampleSpread(1, x.shape[2], samples, x.device), Moments(1, 1, x.shape[2], x.device)
    spread.add(x, torch.arange(samples)[~held].repeat_interleave(TOKENS), weight)
    moments.add(x, x.new_zeros(1, x.shape[1], 1), weight)
    expected = spread.damping(moments.finish())
    found = gathered(weighting, samples)
    found.finish(run.host.nodes[1])
    assert found.damping == pytest.approx(expected, rel=1e-3)
    assert found.damping > 0.02


def test_layers_are_damped_by_what_their_samples_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(6, 4)), batches(6)
    prepared = prepared_model(net, data, weight_bits=2, activation_bits=None)
    asked = learned(learn(prepared, data, damping="auto"), "0")
    monkeypatch.setattr(SampleSpread, "damping", lambda *_: 1e3)
    heavy = learned(learn(prepared, data, damping="auto"), "0")
    given = learned(learn(prepared, data, damping=1e3), "0")
    assert torch.equal(heavy.integers, given.integers)
    assert not torch.equal(asked.integers, given.integers)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.3])
def test_samples_are_tempered_as_far_as_half_of_them_count(decay: float) -> None:
    totals = torch.exp(-decay * torch.arange(40.0))
    # one has nothing to say, and gets no say
    totals[3] = 0.0
    factor = tempered(totals)
    weight = (totals * factor).double()
    share = float(weight.sum().square() / (39 * weight.square().sum()))
    if decay <= 0.0:
        assert torch.equal(factor, torch.ones(40))
    else:
        assert 0.499 < share < 0.51
    torch.testing.assert_close(weight.sum().float(), totals.sum(), rtol=1e-4, atol=0)
    known = totals > 0
    order = totals[known].argsort()
    assert bool((weight[known][order].diff() >= 0).all()), "who had more to say still has"
    assert bool(tempered(torch.exp(-5 * torch.arange(40.0))).isfinite().all())
