"""The network's output is never worse than with nearest: what does harm there is taken back, in FX and PT2E."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx

from adaround_plugin import BlockWise, Finetune, adaround, get_report
from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning import comparison
from adaround_plugin.learning.comparison import Comparison, _part
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.progress import Progress
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.learning.shared import Shared
from adaround_plugin.regions.calibration import Sampling
from integration_tests.models import QUICK
from integration_tests.pairs import pairwise
from integration_tests.region_models import Net, prepared_by, samples, seeded

HOSTS = ["fx", "pt2e"]


def rows(count: int, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)


class Twins(nn.Module):
    """Two layers of the same weights, whose errors cancel as long as both are rounded alike, between others."""

    def __init__(self, others: int = 1) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(12, 12) for _ in range(others))
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.first:
            x = x + 0.1 * torch.tanh(layer(x))
        return self.last(torch.tanh(5 * (self.a(x) - self.b(x)) + x))


def integers(model: fx.GraphModule) -> dict[str, Tensor]:
    return {name: found for name, (found, _) in learned_weights(model).items()}


class Scores(nn.Module):
    """Scores, of which those of some classes are masked out."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked, self.first, self.head = masked, nn.Linear(12, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(torch.relu(self.first(x)))
        out = torch.tensor([True, False, False, True, False, False])
        return scores.masked_fill(out, -inf) if self.masked else scores * torch.where(out, 0.0, 1.0)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", ["default", "blocks", "finetuned"])
def test_scores_of_minus_infinity_count_as_right(host: str, method: str) -> None:
    """As if they were the same number in both networks: what is learned and judged is the others."""
    data, found = list(rows(64).split(16)), []
    for masked in (True, False):
        net = seeded(lambda masked=masked: Scores(masked))
        prepared = prepared_by(host, None, net, data)
        chosen = BlockWise(layers=QUICK, iterations=20) if method == "blocks" else QUICK
        finetune = Finetune(iterations=20, learning_rate=3e-3) if method == "finetuned" else None
        found.append(get_report(adaround(prepared, data, chosen, finetune=finetune, progress=False)))
    masked, plain = found
    assert 0 < masked.output_error < masked.nearest_output_error
    assert masked.output_error == pytest.approx(plain.output_error, rel=0.1 if finetune else 1e-3)
    assert [block.iterations for block in masked.learned_on_samples] == [20] * (method != "default")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("others", [1, 22])
def test_what_does_harm_is_taken_back_and_nothing_else(host: str, others: int) -> None:
    data = list(rows(384).split(16))
    net = seeded(lambda: Twins(others))
    net.b.load_state_dict(net.a.state_dict())
    prepared = prepared_by(host, None, net, data, 3)
    # b stays nearest, so that the error of a, which is less, is not cancelled any more
    learned = adaround(prepared, data, QUICK, exclude=["b", "last"], progress=False)
    nearest = adaround(prepared, data, "nearest", exclude=["b", "last"], progress=False)
    report, baseline = get_report(learned), get_report(nearest)
    assert report.nearest_output_error == pytest.approx(baseline.output_error, rel=1e-5)
    assert baseline.nearest_output_error == baseline.output_error
    assert report.output_error <= report.nearest_output_error
    layers = {layer.name: layer for layer in report.layers}
    assert not layers["a"].learned
    assert layers["a"].learned_holdout < layers["a"].nearest_holdout
    assert "the network's output is better" in layers["a"].note
    assert layers["a"].flipped == 0
    assert layers["a"].bias == "kept"
    assert torch.equal(integers(learned)["a"], integers(nearest)["a"])
    kept = [layer for layer in report.layers if layer.learned]
    # of many layers neighbours are taken back with it
    assert len(kept) >= len(report.layers) - (1 if others == 1 else 2)
    assert all("network's output" not in layer.note for layer in kept)


class Chain(nn.Module):
    """Convolutions of speech, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 16, 5, padding=2), nn.Conv1d(16, 16, 5, padding=2, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean(2))


@pytest.mark.parametrize(("host", "activation_bits", "count"), pairwise(HOSTS, [None, 8], [4, 16, 40]))
def test_never_worse_than_nearest_on_held_out_samples(host: str, activation_bits: int | None, count: int) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        data = list(torch.randn(count, 2, 24, generator=generator).split(8))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            prepared = prepared_by(host, activation_bits, Chain().eval(), data, 4)
        report = get_report(adaround(prepared, data, progress=False))
        baseline = get_report(adaround(prepared, data, "nearest", progress=False))
        assert report.nearest_output_error == pytest.approx(baseline.output_error, rel=1e-5)
        assert report.output_error <= baseline.output_error * (1 + 1e-6)


@pytest.mark.parametrize("finetune", [None, Finetune(iterations=4)])
def test_nothing_is_left_of_what_is_worse_altogether(
    finetune: Finetune | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = samples(48)
    prepared = prepared_by("fx", 8, seeded(Net), data, 3)
    measured = Comparison.error

    def worse(self: Comparison, roundings: dict[str, Any], scales: dict[str, float], of: list[float]) -> float:
        return measured(self, roundings, scales, of) + (1000 if roundings or scales else 0)

    monkeypatch.setattr(Comparison, "error", worse)
    learned = adaround(prepared, data, QUICK, finetune=finetune, progress=False)
    report = get_report(learned)
    assert report.output_error == report.nearest_output_error < 1000
    assert not any(layer.learned for layer in report.layers)
    expected = adaround(prepared, data, "nearest", progress=False)
    x = data[0]
    assert torch.equal(convert_to_reference_fx(learned)(x), convert_to_reference_fx(expected)(x))


def test_a_layer_that_does_no_harm_without_another_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    data = list(rows(384).split(16))
    prepared = prepared_by("fx", None, seeded(Twins), data, 3)
    layers = get_report(adaround(prepared, data, QUICK, progress=False)).layers
    a, b, c, *_ = (layer.name for layer in layers if layer.learned)
    # by which of the three are nearest: b does harm beside a, and none without
    errors = {frozenset[str](): 10.0, frozenset({a}): 7.0, frozenset({b}): 8.0, frozenset({c}): 8.5}
    errors |= {frozenset({a, b}): 9.0, frozenset({a, c}): 4.0, frozenset({a, b, c}): 4.5}

    def told(self: Comparison, roundings: dict[str, Any], scales: dict[str, float], of: list[float]) -> float:
        kept = {name for name, rounding in roundings.items() if rounding.learned}
        return errors[frozenset({a, b, c} - kept)] if roundings else 5.0

    monkeypatch.setattr(Comparison, "error", told)
    report = get_report(adaround(prepared, data, QUICK, progress=False))
    assert {layer.name for layer in report.layers if "nearest: with it" in layer.note} == {a, c}
    assert (report.output_error, report.nearest_output_error) == (4.0, 5.0)


def test_an_output_that_is_no_number_any_more_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    data = samples(48)
    prepared = prepared_by("fx", None, seeded(Net), data, 3)
    measured = Comparison.error

    def broken(self: Comparison, roundings: dict[str, Any], scales: dict[str, float], of: list[float]) -> float:
        return inf if roundings else measured(self, roundings, scales, of)

    monkeypatch.setattr(Comparison, "error", broken)
    report = get_report(adaround(prepared, data, QUICK, progress=False))
    assert report.output_error == report.nearest_output_error
    assert not any(layer.learned for layer in report.layers)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("holdout", [0, 0.25])
def test_errors_are_those_of_the_pass_on_all_batches(host: str, holdout: float) -> None:
    data = samples(96, 16)
    opened = open_host(prepared_by(host, None, seeded(Net), data, 3))
    arguments = [[batch] for batch in data]
    sampling = Sampling.of(arguments, holdout, 1000, 0)
    run = Pass(opened, arguments, sampling, report=ReportBuilder(Progress(shown=False)), shared=Shared())
    with torch.no_grad():
        expected = run.finish()
        found = Comparison(opened, arguments, sampling).error({}, {}, expected.variances)
    assert found == pytest.approx(expected.mean, rel=1e-5)


# --- what is compared on


def part(
    arguments: Sequence[list[Any]], holdout: float, batch_size: int | None = None, alone: bool = True
) -> tuple[list[Any], Tensor]:
    batches = list(arguments)
    return _part(batches, Sampling.of(batches, holdout, 1000, 0), batch_size, alone)


def test_held_out_samples_are_put_together() -> None:
    numbers = torch.arange(100.0).unsqueeze(1)
    batches, judged = part([[one] for one in numbers.split(8)], 0.25)
    sampling = Sampling.of([[numbers]], 0.25, 1000, 0)
    expected = numbers[sampling.held_out(0, 100)]
    assert torch.equal(torch.cat([one for (one,) in batches]), expected)
    assert [len(one) for (one,) in batches] == [8, 8, 8, 1]
    assert judged.all()


def test_graphs_of_a_fixed_size_get_whole_batches_and_judge_what_is_held_out() -> None:
    numbers = torch.arange(40.0).unsqueeze(1)
    batches, judged = part([[one] for one in numbers.split(8)], 0.25, 8)
    assert [len(one) for (one,) in batches] == [8, 8]
    held = numbers[Sampling.of([[numbers]], 0.25, 1000, 0).held_out(0, 40)]
    found = torch.cat([one for (one,) in batches])
    assert torch.equal(found[judged], held)
    assert len(found.unique()) == 16


@pytest.mark.parametrize("alone", [True, False])
def test_what_cannot_be_put_together_is_judged_in_its_batches(alone: bool) -> None:
    arguments = [[torch.full((4, 2 + number % 2 * alone), float(number))] for number in range(100)]
    batches, judged = part(arguments, 0.25, alone=alone)
    assert len(batches) == 32
    assert all(any(batch is one for one in arguments) for batch in batches)
    assert 0.1 < judged.double().mean() < 0.5


@pytest.mark.parametrize("holdout", [0.125, 0.005])
def test_batches_that_cannot_be_put_together_are_those_with_held_out_samples(holdout: float) -> None:
    arguments = [[torch.full((1, 2 + number % 2), float(number))] for number in range(512)]
    batches, judged = part(arguments, holdout)
    assert judged.all()
    sampling = Sampling.of(arguments, holdout, 1000, 0)
    assert len(batches) == sum(int(sampling.held_out(batch, 1)) for batch in range(512)) > 0


def test_batches_of_one_beside_a_constant_are_put_together() -> None:
    mask = torch.ones(1, 5)
    batches, judged = part([[torch.full((1, 2), float(number)), mask] for number in range(64)], 0.25)
    assert len(batches) == 16
    assert judged.all()
    assert all(torch.equal(one, mask) for _, one in batches)


def test_without_held_out_samples_all_count_of_some_batches() -> None:
    numbers = torch.arange(1024.0).unsqueeze(1)
    batches, judged = part([[one] for one in numbers.split(8)], 0)
    assert len(batches) == 16
    assert not judged.any()


@pytest.mark.parametrize("host", HOSTS)
def test_a_stream_gives_its_outputs_and_keeps_no_more_than_it_needs(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = samples(16, 16)
    opened = open_host(prepared_by(host, None, seeded(Net), data, 3))
    for stream in open_streams(opened):
        values = stream.bind([data[0]])
        stream.run_nodes(values, stream.runnable(set()))
        ends = [node for node in values if node not in stream.placeholders][-3:]
        expected = [stream.value(end, values) for end in ends]
        alive = []
        run = type(stream).run_nodes

        def counted(self: Any, values: dict[Any, Any], nodes: Any, run: Any = run, alive: list[int] = alive) -> None:
            run(self, values, nodes)
            alive.append(len(values))

        with monkeypatch.context() as patch:
            patch.setattr(type(stream), "run_nodes", counted)
            found = stream.outputs([data[0]], ends)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert len(alive) > 10
        assert max(alive) <= 3 + len(ends)


def test_a_part_is_compared_that_no_run_of_layers_exceeds() -> None:
    for count in (0, 1, 3, 16, 17, 100):
        runs = comparison._runs(list(range(count)))  # type: ignore[arg-type]
        assert [one for run in runs for one in run] == list(range(count))
        assert len(runs) == min(16, count)
        sizes = [len(run) for run in runs]
        assert not sizes or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("sizes", [(1, 16, 16, 16), (16, 16, 16, 1)])
def test_the_largest_batch_tells_whether_samples_stand_alone(sizes: tuple[int, ...]) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x - x.mean(0))

    data = list(rows(sum(sizes)).split(sizes))
    opened = open_host(prepared_by("fx", None, seeded(Centred), data[1:], 3))
    arguments = [[batch] for batch in data]
    with torch.no_grad():
        found = Comparison(opened, arguments, Sampling.of(arguments, 0.125, 1000, 0))
    assert all(len(batch) == 16 for (batch,) in found._batches)


def of_fives(x: Tensor) -> Tensor:
    return x * {8: 1.0, 16: 2.0}[x.shape[0]]


fx.wrap("of_fives")


class Table(nn.Module):
    """Takes batches of some sizes only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(of_fives(x))


def test_a_network_that_does_not_take_one_sample_keeps_its_batches() -> None:
    data = list(rows(64).split(16))
    prepared = prepared_by("fx", None, seeded(Table), data, 3)
    arguments = [[batch] for batch in data]
    with torch.no_grad():
        compared = Comparison(open_host(prepared), arguments, Sampling.of(arguments, 0.125, 1000, 0))
    assert [len(batch) for (batch,) in compared._batches] == [16, 16, 16, 16]
    for method in ("nearest", "default"):
        report = get_report(adaround(prepared, data, method, progress=False))
        assert report.output_error <= report.nearest_output_error


def test_the_one_layer_that_makes_nan_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    data = samples(48)
    prepared = prepared_by("fx", None, seeded(Net), data, 3)
    name = get_report(adaround(prepared, data, QUICK, progress=False)).layers[1].name
    measured = Comparison.error

    def broken(self: Comparison, roundings: dict[str, Any], scales: dict[str, float], of: list[float]) -> float:
        return inf if name in roundings else measured(self, roundings, scales, of)

    monkeypatch.setattr(Comparison, "error", broken)
    report = get_report(adaround(prepared, data, QUICK, progress=False))
    assert [layer.name for layer in report.layers if "network's output" in layer.note] == [name]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    ("between", "alone"),
    [
        (torch.tanh, True),
        (lambda x: torch.relu(x - x.mean(1, keepdim=True)), True),
        (lambda x: torch.relu(x * torch.arange(8.0).unsqueeze(1)), False),
        (lambda x: torch.relu(x.cumsum(0)), False),
    ],
)
def test_samples_are_put_together_only_where_they_stand_alone(
    between: Callable[[Tensor], Tensor], alone: bool, dynamic: bool
) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(between(self.a(x)))

    data = list(rows(64).split(8))
    opened = open_host(prepared_by("pt2e", None, seeded(Between), data, 3, dynamic))
    arguments = [[batch] for batch in data]
    with torch.no_grad():
        found = Comparison(opened, arguments, Sampling.of(arguments, 0.25, 1000, 0))
    assert len(found._batches) == (2 if alone else 8)
    assert int(found._judged.sum()) == 16
