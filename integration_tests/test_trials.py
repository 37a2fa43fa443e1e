"""Which recipe is taken and why, where there are no derivatives, and derivatives in pieces; in FX and PT2E."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, nan, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from adaround_plugin import InvalidOptionError, LayerWise, Paper, adaround, get_report
from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning import column_weights, trials
from adaround_plugin.learning.columns import Columns
from adaround_plugin.learning.layer import Recipe
from adaround_plugin.learning.methods import Method
from adaround_plugin.learning.output_error import OutputError
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.progress import Progress
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.learning.shared import Shared
from adaround_plugin.learning.trials import NO_MASSIVE, _Trials, _Tried
from adaround_plugin.processes import ALONE
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.pieces import piece
from adaround_plugin.report import Report
from integration_tests.models import QUICK, prepared_model
from integration_tests.pairs import pairwise
from integration_tests.pt2e_models import EveryOperator
from integration_tests.region_models import Opaque, opaque, prepared_by, samples, seeded

HOSTS = ["fx", "pt2e"]
SOLVED = replace(QUICK, column_weighting="fisher", output_hessian=True)


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def rows(count: int, *shape: int) -> Tensor:
    """`(count, *shape)`, or `(count, 12)`: noise whose entries are correlated, some samples louder than others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *(shape or (12,)), generator=generator)
    mix = torch.randn(x.shape[-1], x.shape[-1], generator=generator)
    loud = 1 + torch.rand(count, *[1] * len(shape or (12,)), generator=generator)
    return loud * (x @ mix)


class Images(nn.Module):
    """Convolutions, groups, a branch and a head; no activation function that lets channels die, which makes ties."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)
        self.short, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = torch.tanh(self.b(x)) + self.short(x[..., 1:-1, 1:-1])
        return self.head(torch.tanh(x).mean((2, 3)))


class Small(nn.Module):
    """Two linear layers, and what is made of the values between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(12, 8), nn.Linear(8, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def small(host: str, data: Sequence[Tensor], between: Callable[[Tensor], Tensor] = torch.tanh) -> fx.GraphModule:
    return prepared_by(host, None, seeded(lambda: Small(between)), data)


def learn(prepared: nn.Module, data: Sequence[Any], method: str | Method = "default") -> tuple[Tensor, Report]:
    """All integers, and the report."""
    learned = adaround(prepared, list(data), method, progress=False)
    return torch.cat([integers.flatten() for integers, _ in learned_weights(learned).values()]), get_report(learned)


def untried(report: Report) -> list[str]:
    """The notes of recipes that were not tried, but for those against massive activations."""
    notes = [trial.note for trial in report.trials if trial.output_error is None]
    return [note for note in notes if note != NO_MASSIVE]


# --- the split of samples into batches


@pytest.mark.parametrize("host", HOSTS)
def test_recipe_and_integers_are_those_of_the_samples_however_they_are_split(host: str) -> None:
    images = torch.cat(samples(256, 32))
    prepared = prepared_by(host, None, seeded(Images), images.split(32), 4)
    expected, of_one = learn(prepared, [images])
    assert len(of_one.trials) == 3
    for size in (4, 32, 64):
        found, report = learn(prepared, images.split(size))
        assert report.recipe == of_one.recipe
        for one, other in zip(report.trials, of_one.trials, strict=True):
            assert (one.recipe, one.note) == (other.recipe, other.note)
            if not one.note:
                assert one.output_error == pytest.approx(other.output_error, rel=1e-5)
        assert not untried(report)
        # measured: none, and at 3 bits two rows of 52, whose scales were all but as good
        assert (found != expected).double().mean() < 0.01
        assert report.output_error == pytest.approx(of_one.output_error, rel=0.05)


class Scaled(Small):
    """A few samples count far more than all others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 * x[:, :1]).exp()


def importance(data: Sequence[Tensor]) -> list[Tensor]:
    """Of the samples in order, at each call site."""
    host = open_host(prepared_by("fx", None, seeded(Scaled), data))
    arguments = [[batch] for batch in data]
    run = Pass(host, arguments, Sampling.of(arguments, 0, 10**6, 0), report=ReportBuilder(Progress(shown=False)))
    return [torch.cat(of_batches, 1) for of_batches in Columns(run, "fisher").weights.importance.values()]


def test_samples_of_which_few_count_are_weighed_alike_however_they_are_split() -> None:
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    expected = importance([x])
    for of_site in expected:
        effective = of_site.sum(1).square() / of_site.square().sum(1) / len(x)
        assert float(effective) < 0.55
    for size in (3, 16):
        for found, wanted in zip(importance(x.split(size)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


# --- what trials tell


def errors(
    count: int, held: float, learned: float, seed: int = 0, noise: float = 0.1, held_out: int | None = None
) -> OutputError:
    """Errors of samples whose means are these on either side; every second one is held out, or so many."""
    is_held = torch.arange(count) % 2 == 0 if held_out is None else torch.arange(count) < held_out
    draw = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for part in (is_held, ~is_held):
        draw[part] -= draw[part].mean() if part.sum() else 0.0
    mean = torch.tensor([learned, held], dtype=torch.float64)[is_held.long()]
    return OutputError(mean * (1 + noise * draw), is_held)


def tried(*of_trials: OutputError, total: int = 512, weighting: str = "none") -> _Tried:
    return _Tried(Recipe(column_weighting=weighting), list(of_trials), total)


@pytest.mark.parametrize("total", [64, 100, 1000, 10**6])
@pytest.mark.parametrize("held_out", [16, 32])
def test_the_prediction_is_what_akaikes_formula_makes_of_both_errors(total: int, held_out: int) -> None:
    held, learned, count = 0.5, 0.3, 64
    number = count - held_out
    # e (1 + d / n) = held and e (1 - d / n) = learned
    e = (held + learned) / 2
    d = number * (held - learned) / (2 * e)
    found = tried(errors(count, held, learned, held_out=held_out), total=total)
    assert found.predicted == pytest.approx(e * (1 + d / total), rel=1e-12)
    assert found.share == number / total


def test_several_trials_count_by_their_samples() -> None:
    one, other = errors(64, 0.5, 0.3), errors(64, 0.9, 0.5, seed=1)
    assert tried(one, other).predicted == pytest.approx(tried(errors(64, 0.7, 0.4)).predicted, rel=1e-12)
    assert tried(one, other).share == 32 / 512


def test_a_trial_of_all_samples_predicts_no_better_than_it_found() -> None:
    assert tried(errors(64, 0.5, 0.3), total=32).predicted == pytest.approx(0.5)
    # learning samples are never more than those of the run, but a caller may say so
    assert tried(errors(64, 0.5, 0.3), total=8).share == 1


def test_samples_of_one_kind_stand_for_both() -> None:
    assert tried(errors(8, 0.5, 0.3, held_out=0)).predicted == pytest.approx(0.3)


def test_the_deviation_is_that_of_other_choices_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[_Tried, _Tried]:
        # what both have in common is far more than that in which they differ
        common = torch.randn(64, generator=generator, dtype=torch.float64).exp()
        unlike = common + 0.2 * torch.randn(64, generator=generator, dtype=torch.float64)
        held = torch.arange(64) % 4 < 2
        return tried(OutputError(common, held), total=128), tried(OutputError(unlike, held), total=128)

    pairs = [draw() for _ in range(1500)]
    differences = torch.tensor([one.predicted - other.predicted for one, other in pairs])
    deviations = torch.tensor([other.deviation(one) for one, other in pairs])
    assert float(deviations.mean()) == pytest.approx(float(differences.std()), rel=0.05)
    one, other = pairs[0]
    apart = (one.errors[0].samples - other.errors[0].samples)[one.errors[0].held_out].var() / 32
    beside = (one.errors[0].samples - other.errors[0].samples)[~one.errors[0].held_out].var() / 32
    share = 32 / 128
    expected = sqrt(((1 + share) / 2) ** 2 * float(apart) + ((1 - share) / 2) ** 2 * float(beside))
    assert other.deviation(one) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total", [64, 128, 4096])
def test_a_first_weighed_by_derivatives_is_favoured_the_more_the_fewer_samples_tell(total: int) -> None:
    other = tried(errors(64, 0.4, 0.3), total=total)
    plain, fisher = (tried(errors(64, 0.5, 0.3), total=total, weighting=one) for one in ("none", "fisher"))
    share = 32 / total
    assert other.margin(plain) == pytest.approx(plain.predicted - other.predicted, rel=1e-12)
    favoured = (1 - trials._FAVOUR * (1 - share)) * fisher.predicted
    assert other.margin(fisher) == pytest.approx(favoured - other.predicted, rel=1e-12)
    # it is the first that is favoured, no other
    assert fisher.margin(other) == other.predicted - fisher.predicted


class HandMade(_Trials):
    """Trials whose errors are given: of each round, of its recipes."""

    def __init__(self, *rounds: Sequence[OutputError], total: int = 512) -> None:
        self._total, self._rounds = total, list(rounds)
        self._report, self._shared = ReportBuilder(Progress(shown=False)), Shared()
        self._processes = ALONE
        self.asked: list[list[Recipe]] = []

    def _errors(self, recipes: Sequence[Recipe], offset: float = 0.5) -> list[OutputError]:
        assert offset == (0.0 if self.asked else 0.5)
        self.asked.append(list(recipes))
        return list(self._rounds[len(self.asked) - 1])

    @property
    def reported(self) -> list[float | None]:
        return [trial.output_error for trial in self._report.trials]


FIRST, SECOND, THIRD = Recipe(), Recipe(propagate_error=False), Recipe(column_weighting="fisher")


def judged(*found: OutputError, again: Sequence[OutputError] = (), total: int = 64) -> tuple[Recipe, HandMade]:
    """The recipe taken; of 64 samples and no more there is no second round."""
    made = HandMade(found, again, total=total)
    return made.best([FIRST, SECOND, THIRD][: len(found)]), made


def test_the_first_stays_unless_another_is_better_by_more_than_the_noise() -> None:
    first = errors(64, 0.5, 0.3)
    for factor in (0.5, 0.9, 0.99, 0.999, 1.0, 1.1):
        other = replace(first, samples=factor * errors(64, 0.5, 0.3, seed=1).samples)
        one, two = tried(first, total=64), tried(other, total=64)
        expected = SECOND if one.predicted - two.predicted > two.deviation(one) else FIRST
        assert judged(first, other)[0] == expected
        # measured: the noise is 2 % of the error
        assert (expected == SECOND) == (factor < 0.95)


def test_of_several_that_are_clearly_better_the_best_is_taken() -> None:
    assert judged(*(errors(64, one, one, seed=i) for i, one in enumerate((0.5, 0.4, 0.3))))[0] == THIRD
    assert judged(*(errors(64, one, one, seed=i) for i, one in enumerate((0.5, 0.3, 0.4))))[0] == SECOND


def test_better_by_little_in_every_sample_is_clear() -> None:
    first = errors(64, 0.5, 0.3)
    assert judged(first, replace(first, samples=first.samples - 1e-4))[0] == SECOND
    assert judged(first, first)[0] == FIRST


def spoilt(value: float, where: int) -> OutputError:
    """Better errors than any, but for one."""
    found = errors(64, 1e-3, 1e-3)
    found.samples[where] = value
    return found


@pytest.mark.parametrize("value", [nan, inf])
# the first sample is held out, the second is not
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("total", [64, 512])
def test_errors_that_are_no_numbers_never_win(value: float, where: int, total: int) -> None:
    good, bad = errors(64, 0.5, 0.3), spoilt(value, where)
    assert tried(bad).predicted == inf
    assert (tried(bad).margin(tried(good)), tried(good).margin(tried(bad))) == (-inf, inf)
    assert tried(bad).margin(tried(bad)) == 0
    recipe, made = judged(good, bad, total=total)
    assert recipe == FIRST
    assert made.reported == [pytest.approx(tried(good, total=total).predicted), None]
    assert judged(good, bad, errors(64, 0.1, 0.1), total=total)[0] == THIRD
    assert judged(bad, bad, total=total)[0] == FIRST
    for others, expected in (([good], SECOND), ([bad, good], THIRD), ([good, bad], SECOND)):
        recipe, made = judged(bad, *others, total=total)
        assert recipe == expected
        assert made.reported[0] is None
        # on other samples nothing else could come of it
        assert len(made.asked) == 1


# --- trying again


def test_a_doubtful_second_is_tried_again_on_other_samples() -> None:
    close = [errors(64, 0.5, 0.3), errors(64, 0.6, 0.4, seed=1), errors(64, 0.499, 0.3, seed=2)]
    recipe, made = judged(*close, again=[errors(64, 0.5, 0.3), errors(64, 0.3, 0.2, seed=3)], total=512)
    assert made.asked == [[FIRST, SECOND, THIRD], [FIRST, THIRD]]
    assert recipe == THIRD
    # both rounds count
    expected = tried(close[2], errors(64, 0.3, 0.2, seed=3)).predicted
    assert made.reported[2] == pytest.approx(expected)
    recipe, made = judged(*close, again=[errors(64, 0.5, 0.3), errors(64, 0.6, 0.4, seed=3)], total=512)
    assert recipe == FIRST


@pytest.mark.parametrize("second", [0.3, 0.8])
def test_a_clear_second_is_not_tried_again(second: float) -> None:
    recipe, made = judged(errors(64, 0.5, 0.3), errors(64, second, second, seed=1), total=512)
    assert len(made.asked) == 1
    assert recipe == (SECOND if second < 0.5 else FIRST)


def test_nothing_is_tried_again_where_there_are_no_other_samples() -> None:
    close = [errors(64, 0.5, 0.3), errors(64, 0.499, 0.3, seed=2)]
    for total, rounds in ((64, 1), (127, 1), (128, 2)):
        assert len(judged(*close, again=close, total=total)[1].asked) == rounds


def test_a_third_is_compared_on_the_samples_that_it_was_tried_on() -> None:
    first, second, third = (errors(64, one, one, seed=i) for i, one in enumerate((0.5, 0.499, 0.52)))
    assert judged(first, second, third)[0] == FIRST
    # other samples are harder for everyone
    again = [errors(64, 0.8, 0.8, seed=3), errors(64, 0.8, 0.8, seed=4)]
    assert judged(first, second, third, again=again, total=512)[0] == FIRST


Seen = list[tuple[Pass, list[list[Any]]]]


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The passes of trials, and their batches; few samples do."""
    seen: Seen = []

    class Kept(Pass):
        def __init__(self, host: Any, arguments: list[list[Any]], *args: Any, **kwargs: Any) -> None:
            super().__init__(host, arguments, *args, **kwargs)
            seen.append((self, arguments))

    monkeypatch.setattr(trials, "Pass", Kept)
    monkeypatch.setattr(trials, "_LEAST_SAMPLES", 16)
    return seen


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("sure", "rounds"), [(0.0, 1), (1e6, 2)])
def test_a_second_round_makes_two_passes_over_samples_of_its_own(
    host: str, sure: float, rounds: int, tries: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is never in doubt, and what always is
    monkeypatch.setattr(trials, "_SURE", sure)
    data = rows(128).split(8)
    _, report = learn(small(host, data), data)
    assert len(report.trials) == 3
    assert len(tries) == 2 + 2 * (rounds - 1)
    seen = [{tuple(row) for (batch,) in arguments for row in batch.tolist()} for _, arguments in tries]
    assert all(one == seen[0] for one in seen[:2])
    assert all(one == seen[-1] for one in seen[2:])
    # as many to learn from as to judge by, in batches as they were given
    assert all(len(one) == 32 for one in seen)
    assert all(len(batch) == 8 for _, arguments in tries for (batch,) in arguments)
    assert not untried(report)
    first, other = (trial for trial in report.trials if trial.output_error is not None)
    if rounds == 1:
        favoured = (1 - trials._FAVOUR * (1 - 16 / 128)) * first.output_error
        assert report.recipe == (other if other.output_error < favoured else first).recipe
    else:
        assert not seen[0] & seen[-1]
        # what is never sure stays with the first
        assert report.recipe == first.recipe
    assert all(run.is_trial for run, _ in tries)


# --- massive activations


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("massive", [False, True])
def test_columns_are_weighed_by_their_norms_only_where_a_few_are_massive(host: str, massive: bool) -> None:
    data = rows(128)
    if massive:
        data[::16] *= 100
    _, report = learn(small(host, data.split(32)), data.split(32))
    by_norm = [trial for trial in report.trials if "inverse_norm" in trial.recipe]
    assert len(by_norm) == 1
    assert (by_norm[0].output_error is not None) == massive
    assert by_norm[0].note == ("" if massive else NO_MASSIVE)
    # asked for by name, it is no question
    asked = LayerWise(column_weighting="inverse_norm")
    assert "inverse_norm" in learn(small(host, data.split(32)), data.split(32), asked)[1].recipe


def test_the_share_of_columns_that_count_is_the_smallest_of_all_layers() -> None:
    graph = fx.Graph()
    sites, generator = [graph.placeholder(name) for name in "ab"], torch.Generator().manual_seed(0)
    shared, shares = Shared(), []
    for site in sites:
        batches = [torch.randn(2, count, 5, generator=generator) ** 3 for count in (40, 7)]
        for number, of_batch in enumerate(batches):
            shared.keep(site, number, of_batch)
            assert shared.columns(site, number) is of_batch
        power = [float(column.square().sum()) for column in torch.cat(batches, 1).double().unbind(1)]
        shares.append(sum(power) ** 2 / (len(power) * sum(one**2 for one in power)))
        shared.end_step()
        assert shared.columns(site, 0) is None
        assert shared.least_share == pytest.approx(min(shares), rel=1e-6)
    # nothing at all says nothing
    shared.keep(sites[0], 0, torch.zeros(1, 3, 5))
    shared.end_step()
    assert shared.least_share == pytest.approx(min(shares), rel=1e-6)


# --- networks without derivatives


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("count", [64, 256])
def test_recipes_that_need_derivatives_are_left_out_where_there_are_none(host: str, count: int) -> None:
    data = rows(count).split(32)
    _, report = learn(prepared_by(host, None, seeded(Opaque), data), data)
    left_out = [trial for trial in report.trials if trial.note and trial.note != NO_MASSIVE]
    kept = [trial for trial in report.trials if trial.output_error is not None]
    needs = [one for one in LayerWise().recipes() if one.column_weighting == "fisher" or one.output_hessian]
    assert needs
    assert [trial.recipe for trial in left_out] == [str(one) for one in needs]
    assert all("no derivative could be taken" in trial.note for trial in left_out)
    assert all(not trial.note and "output hessian" not in trial.recipe for trial in kept)
    assert report.recipe in [trial.recipe for trial in kept]
    assert "fisher" not in report.recipe
    assert "no derivative could be taken" in str(report)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "asked",
    [
        {"column_weighting": "fisher"},
        {"output_hessian": True},
        {"column_weighting": "none", "damping": 0.1, "output_hessian": False},
    ],
)
def test_what_is_asked_for_by_name_is_done_or_an_error(host: str, asked: dict[str, Any]) -> None:
    data = rows(64).split(32)
    prepared = prepared_by(host, None, seeded(Opaque), data)
    if "damping" in asked:
        assert not any(trial.note for trial in learn(prepared, data, LayerWise(**asked))[1].trials)
        return
    for method in (
        LayerWise(**asked),
        replace(SOLVED, **{"column_weighting": "none", "output_hessian": False} | asked),
    ):
        with pytest.raises(InvalidOptionError, match="no derivative could be taken"):
            learn(prepared, data, method)


# --- output_hessian="auto"


@pytest.mark.parametrize("host", HOSTS)
def test_rows_make_up_for_each_other_unless_told_otherwise(host: str) -> None:
    data = rows(256)
    prepared = small(host, data.split(64))
    for count, method, expected in (
        (40, "default", True),
        (256, "default", True),
        (256, LayerWise(output_hessian=True), True),
        (256, LayerWise(output_hessian=False), False),
        (256, LayerWise(solver="nearest"), False),
        (256, "nearest", False),
        (256, Paper(iterations=2), False),
    ):
        _, report = learn(prepared, data[:count].split(64), method)
        assert ("output hessian" in report.recipe) == expected
        assert not untried(report)
        # trials are of what a run does, though they do without
        assert all(("output hessian" in trial.recipe) == expected for trial in report.trials)


# --- derivatives in pieces


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of samples of which derivatives are taken at once."""
    found: list[int] = []
    taken = column_weights.sensitivities

    def counted(stream: Any, nodes: Any, sampling: Sampling, batch: int, *args: Any) -> Any:
        found.append(sampling.size[batch])
        return taken(stream, nodes, sampling, batch, *args)

    monkeypatch.setattr(column_weights, "sensitivities", counted)
    return found


def bytes_of_a_sample(prepared: fx.GraphModule, x: Tensor) -> int:
    stream, _ = open_streams(open_host(prepared))
    values = stream.bind([x[:1]])
    with torch.no_grad():
        stream.run_nodes(values, stream.runnable(set()))
    return sum(value.nbytes for value in values.values())


@pytest.mark.parametrize(
    ("host", "at_once", "method"),
    pairwise(
        HOSTS,
        [0, 1, 5, 15],
        [SOLVED, replace(SOLVED, output_hessian=False), replace(SOLVED, column_weighting="none", solver="annealing")],
    ),
)
def test_derivatives_in_pieces_are_those_of_whole_batches(
    host: str, at_once: int, method: LayerWise, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = samples(44, 16)
    prepared = prepared_by(host, None, seeded(Images), data, 4)
    expected, whole = learn(prepared, data, method)
    assert sizes == [16, 16, 12]
    sizes.clear()
    monkeypatch.setattr("adaround_plugin.regions.pieces._PIECE_BYTES", at_once * bytes_of_a_sample(prepared, data[0]))
    found, report = learn(prepared, data, method)
    wanted = {5: [5, 5, 5, 1, 5, 5, 5, 1, 5, 5, 2], 15: [15, 1, 15, 1, 12]}
    assert sizes == wanted.get(at_once, [1] * 44)
    # measured: none
    assert (found != expected).double().mean() < 0.01
    for one, other in zip(report.layers, whole.layers, strict=True):
        assert one.learned_error == pytest.approx(other.learned_error, rel=1e-4)
        assert (one.columns, one.note) == (other.columns, other.note)
    assert report.output_error == pytest.approx(whole.output_error, rel=1e-4)


class Folded(nn.Module):
    """Tokens on the leading axis, a reused layer, and two inputs in a dictionary beside a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.conv = nn.Linear(12, 8), nn.Linear(8, 8), nn.Conv1d(8, 6, 3, groups=2)

    def forward(self, inputs: dict[str, Tensor], factor: Tensor) -> Tensor:
        x = torch.tanh(self.a(inputs["x"].flatten(0, 1)) * factor)
        x = torch.tanh(self.b(torch.tanh(self.b(x)))).unflatten(0, (-1, 6)) + inputs["shift"]
        return torch.tanh(self.conv(x.transpose(1, 2))).mean(2)


@pytest.mark.parametrize("max_columns", [10**6, 20])
def test_importance_and_products_are_the_same_in_pieces(
    max_columns: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, shift, factor = rows(26, 6, 12), rows(26, 1, 8), torch.tensor(0.3)
    data = [({"x": one, "shift": other}, factor) for one, other in zip(x.split(9), shift.split(9), strict=True)]
    host = open_host(prepared_model(seeded(Folded), data, weight_bits=3, activation_bits=None))
    arguments = [list(batch) for batch in data]

    def found() -> Columns:
        sampling = Sampling.of(arguments, 0.25, max_columns, 0)
        return Columns(Pass(host, arguments, sampling, report=ReportBuilder(Progress(shown=False))), "fisher", True)

    whole = found()
    assert sizes == [9, 9, 8]
    monkeypatch.setattr("adaround_plugin.regions.pieces._PIECE_BYTES", 1)
    pieces = found()
    assert sizes[3:] == [1] * 26
    assert len(whole.weights.importance) == 4
    assert whole.weights.importance.keys() == pieces.weights.importance.keys()
    for site, of_batches in whole.weights.importance.items():
        for one, other in zip(of_batches, pieces.weights.importance[site], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)
    assert whole.weights.outputs.keys() == pieces.weights.outputs.keys() == {node.name for node in host.nodes}
    for name, one in whole.weights.outputs.items():
        torch.testing.assert_close(pieces.weights.outputs[name], one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 4, 9, 100])
def test_pieces_are_the_samples_in_their_order(size: int) -> None:
    lengths = (9, 4, 1)
    whole = Sampling.of([[torch.zeros(length, 2)] for length in lengths], 0.25, 10, 3)
    pieces, numbers = whole.in_pieces(size)
    assert [number for of_batch in numbers for number in of_batch] == list(range(len(pieces.size)))
    for batch, of_batch in enumerate(numbers):
        covered = [sample for number in of_batch for sample in pieces.numbers(number)]
        assert covered == list(whole.numbers(batch))
        assert all(1 <= pieces.size[number] <= size for number in of_batch)
        held = [pieces.held_out(number, pieces.size[number]) for number in of_batch]
        assert torch.equal(torch.cat(held), whole.held_out(batch, lengths[batch]))
    assert (pieces.every, pieces.max_columns, pieces.seed) == (whole.every, whole.max_columns, whole.seed)
    assert pieces.total == whole.total


def test_a_piece_has_its_samples_of_every_input() -> None:
    nodes = [fx.Graph().placeholder(name) for name in "abcd"]
    x, table = torch.arange(10.0).reshape(5, 2), torch.ones(7, 2)
    values = dict(zip(nodes, ([x, {"y": -x}], table, torch.tensor(2.0), None), strict=True))
    for begin, size in ((0, 2), (2, 2), (4, 1), (0, 5)):
        (one, other), *rest = piece(values, 5, begin, size).values()
        assert torch.equal(one, x[begin : begin + size])
        assert torch.equal(other["y"], -x[begin : begin + size])
        assert rest[0] is table
        assert float(rest[1]) == 2
        assert rest[2] is None


def test_a_constant_as_long_as_a_batch_is_no_axis_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    class Placed(Small):
        def forward(self, x: Tensor, place: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x) + place))

    data = [(x, torch.linspace(-3, 3, 8).unsqueeze(1)) for x in rows(16, 8, 12).split(8)]
    host = open_host(prepared_model(seeded(Placed), data, weight_bits=3, activation_bits=None))
    arguments = [list(batch) for batch in data]
    found = []
    for most in (2**30, 1):
        monkeypatch.setattr("adaround_plugin.regions.pieces._PIECE_BYTES", most)
        run = Pass(host, arguments, Sampling.of(arguments, 0, 10**6, 0), report=ReportBuilder(Progress(shown=False)))
        found.append(Columns(run, "fisher").weights.importance)
    for site, of_batches in found[0].items():
        for one, other in zip(of_batches, found[1][site], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


def test_a_program_for_one_batch_size_keeps_its_batches(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaround_plugin.regions.pieces._PIECE_BYTES", 1)
    data = samples(48, 16)
    prepared = prepared_by("pt2e", None, seeded(Images), data, dynamic=False)
    assert open_host(prepared).batch_size == 16
    _, report = learn(prepared, data)
    assert set(sizes) == {16}
    assert not untried(report)
    _, report = learn(prepared, data, SOLVED)
    assert set(sizes) == {16}
    assert not any(layer.note.startswith(("columns", "rows")) for layer in report.layers)


def picked(number: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x - x[number]


def in_halves(x: Tensor) -> Tensor:
    one, other = torch.relu(x).chunk(2)
    return one - other


def in_turns(x: Tensor) -> Tensor:
    return torch.relu(x[::2] - x[1::2])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("total", "size", "between"),
    [
        (64, 8, lambda x: torch.relu(x).view(8, -1)),
        (512, 8, lambda x: torch.relu(x).view(8, -1)),
        (512, 512, lambda x: torch.relu(x).view(512, -1)),
        # of one sample this network makes no output
        (64, 8, in_turns),
        (64, 8, lambda x: torch.relu(x - x.mean(0))),
        (64, 8, in_halves),
        (64, 8, picked(7)),
        (512, 512, picked(300)),
        (64, 8, picked(0)),
    ],
)
def test_a_network_whose_samples_do_not_stand_alone_keeps_its_batches(
    host: str,
    total: int,
    size: int,
    between: Callable[[Tensor], Tensor],
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adaround_plugin.regions.pieces._PIECE_BYTES", 1)
    data = rows(total).split(size)
    prepared = small(host, data, between)
    for method in ("default", SOLVED):
        sizes.clear()
        _, report = learn(prepared, data, method)
        assert set(sizes) == {size}
        assert not untried(report)
        assert not any("derivative" in layer.note for layer in report.layers)


@pytest.mark.parametrize(("host", "dynamic"), [("fx", True), ("pt2e", True), ("pt2e", False)])
def test_large_batches_are_tried_in_smaller_ones_where_any_size_will_do(host: str, dynamic: bool, tries: Seen) -> None:
    data = rows(128)
    prepared = prepared_by(host, None, seeded(Small), [data], dynamic=dynamic)
    learn(prepared, [data])
    assert tries
    assert all([len(batch) for (batch,) in arguments] == [32 if dynamic else 128] for _, arguments in tries)


# --- rows of next to nothing


class Dead(nn.Module):
    """Output channels without weights, of all kinds of layers."""

    def __init__(self, dead: float) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)
        self.c = nn.Linear(32, 6)
        self.dead = dead

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).flatten(1))


def dead_rows(dead: float) -> nn.Module:
    net = seeded(lambda: Dead(dead))
    with torch.no_grad():
        # of the second layer, a whole group but for one row
        for weight, channels in ((net.a.weight, slice(0, 8, 3)), (net.b.weight, slice(1, 4)), (net.c.weight, [2, 3])):
            weight[channels] = dead
    return net


# scales of 1e-30 are those whose products float32 cannot hold
@pytest.mark.parametrize(("host", "symmetric", "dead"), pairwise(HOSTS, [True, False], [0.0, 1e-40, 1e-30, 1e-20]))
def test_layers_with_dead_rows_are_learned(host: str, symmetric: bool, dead: float) -> None:
    data = rows(64, 2, 4, 4).split(32)
    if host == "fx":
        prepared = prepared_model(dead_rows(dead), data, weight_bits=2, activation_bits=None, symmetric=symmetric)
    else:
        shapes = ({0: Dim.AUTO},)
        program = torch.export.export(dead_rows(dead), (data[0],), dynamic_shapes=shapes, strict=True).module()
        prepared = prepare_pt2e(program, EveryOperator(weight_bits=2, symmetric=symmetric))
        for batch in data:
            prepared(batch)
    nearest = learn(prepared, data, "nearest")[1].output_error
    for solver in ("annealing", "gptq"):
        _, report = learn(prepared, data, replace(SOLVED, solver=solver))
        assert not any("finite derivative" in layer.note for layer in report.layers)
        assert report.output_error < nearest
