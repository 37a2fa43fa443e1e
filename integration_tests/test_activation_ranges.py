"""Batches that differ from what activation observers saw: counted in both hosts, and told with a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import MovingAverageMinMaxObserver, QConfig, QConfigMapping
from torch.ao.quantization.quantize_fx import prepare_fx

from adaround_plugin import AdaRoundObserver, Finetune, adaround, get_report
from adaround_plugin.hosts.base import ObservedActivation
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning.activation_ranges import RangeTally
from adaround_plugin.processes import Processes
from adaround_plugin.report import Report
from integration_tests.models import QUICK
from integration_tests.region_models import ZeroPadded, prepared_by, samples, seeded

DATA, NET = samples(), seeded(ZeroPadded)


def report(prepared: fx.GraphModule, factor: float, **options: Any) -> Report:
    return get_report(adaround(prepared, [factor * batch for batch in DATA], QUICK, progress=False, **options))


@pytest.mark.parametrize("toolkit", ["fx", "pt2e"])
@pytest.mark.parametrize("bits", [8, 4])
def test_batches_that_observers_did_not_see_are_told(toolkit: str, bits: int) -> None:
    prepared = prepared_by(toolkit, bits, NET, DATA, 4)
    # the network's input is quantized, and the outputs of its layers
    observed = {one.name: one for one in open_host(prepared).observed}
    assert len(observed) > 5
    assert report(prepared, 1.0).clipped == []
    found = report(prepared, 8.0)
    clipped = {one.name: one for one in found.clipped}
    assert clipped.keys() <= observed.keys()
    one = clipped["x"]
    values = torch.cat(DATA)
    assert (one.low, one.high) == pytest.approx((float(values.min()), float(values.max())))
    assert (one.least, one.greatest) == pytest.approx((8 * one.low, 8 * one.high))
    beyond = 0.05 * (one.high - one.low)
    outside = (8 * values < one.low - beyond) | (8 * values > one.high + beyond)
    assert one.share == pytest.approx(float(outside.float().mean()))
    assert "warning: " in str(found)
    assert "Calibrate with the batches that you learn from" in found.warnings[0]
    assert Report.from_json(found.to_json()) == found


def test_each_batch_counts_once_however_often_the_network_runs() -> None:
    prepared = prepared_by("fx", 4, NET, DATA, 4)
    once = report(prepared, 8.0)
    assert report(prepared, 8.0, finetune=Finetune(iterations=2)).clipped == once.clipped


def test_weights_alone_have_no_range() -> None:
    assert report(prepared_by("fx", None, NET, DATA, 4), 8.0).clipped == []


def test_observers_that_follow_a_moving_average_do_not_warn_of_what_they_saw() -> None:
    qconfig = QConfig(activation=MovingAverageMinMaxObserver, weight=AdaRoundObserver)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    prepared = prepare_fx(model, QConfigMapping().set_global(qconfig), (DATA[0],))
    with torch.no_grad():
        for batch in DATA:
            prepared(batch)
    assert report(prepared, 1.0).clipped == []
    assert report(prepared, 8.0).clipped


def test_a_tally_takes_a_share_of_large_values_and_skips_what_has_none() -> None:
    graph = fx.Graph()
    x, ids, empty = (graph.placeholder(name) for name in ("x", "ids", "empty"))
    tally = RangeTally([ObservedActivation(str(node), node, -1.0, 1.0) for node in (x, ids, empty)], [x, ids, empty])
    assert tally.due([x]) == [x, ids, empty]
    large = torch.zeros(4, 8, 64, 64)
    # one channel of eight, over all samples
    large[:, 3] = 2.0
    for _ in range(2):
        tally.look([x, ids, empty], {x: large, ids: torch.arange(9), empty: torch.zeros(0)})
    (found,) = tally.clipped()
    assert (found.name, found.least, found.greatest) == ("x", 0.0, 2.0)
    assert found.share == pytest.approx(1 / 8, abs=0.005)
    assert tally.due([x]) == []


class Two(Processes):
    """Beside a process whose values all lie outside."""

    def gathered(self, at: str, value: Any) -> list[Any]:
        return [value, {0: (-9.0, 1.5, 30, 30)}]


def test_the_batches_of_all_processes_count() -> None:
    node = fx.Graph().placeholder("x")
    tally = RangeTally([ObservedActivation("x", node, -1.0, 1.0)], [node])
    tally.look(tally.due([]), {node: torch.linspace(-1, 1, 90)})
    assert tally.clipped() == []
    (found,) = tally.clipped(Two())
    assert (found.least, found.greatest, found.share) == (-9.0, 1.5, 0.25)
