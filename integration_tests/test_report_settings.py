"""What a report says repeats what was done: the settings in it, given to `adaround`, make the same model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import adaround_plugin
from adaround_plugin import BlockWise, Finetune, LayerWise, Paper, adaround, get_report, solvers
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.paper import variants
from adaround_plugin.solvers import CoordinateDescent
from integration_tests.models import QUICK
from integration_tests.region_models import Net, prepared, samples

METHODS = {
    "recipe": "default",
    "baseline": "nearest",
    "solver": LayerWise(solver=CoordinateDescent()),
    "blocks": BlockWise(layers=QUICK, iterations=10),
    "paper": Paper(iterations=10, variant=variants.Sigmoid),
}
NAMES = {**vars(solvers), **vars(variants), **vars(adaround_plugin)}


@pytest.mark.parametrize("host", ["fx", "pt2e"])
@pytest.mark.parametrize("method", METHODS)
def test_the_settings_repeat_what_was_done(host: str, method: str) -> None:
    data = samples()
    model = prepared(host, None, Net)
    learned = adaround(model, data, METHODS[method], exclude=["head"], seed=5, progress=False)
    report = get_report(learned)
    given = {name: eval(value, NAMES) for name, value in report.settings.items()}
    assert (given["seed"], given["exclude"], given["finetune"]) == (5, ["head"], False)
    again = adaround(model, data, **given, progress=False)
    assert_same(learned, again)
    repeated = get_report(again)
    assert repeated.settings == report.settings
    assert repeated.output_error == report.output_error
    # what was tried is settled
    assert repeated.trials == []


def test_finetuning_is_in_the_settings() -> None:
    data = samples()
    model = prepared("fx", None, Net)
    learned = adaround(model, data, QUICK, finetune=Finetune(iterations=5, integers=True), progress=False)
    settings = get_report(learned).settings
    given = {name: eval(value, NAMES) for name, value in settings.items()}
    assert given["finetune"] == Finetune(iterations=5, integers=True)
    assert_same(learned, adaround(model, data, **given, progress=False))


def test_a_report_names_its_versions_and_stays_plain_data() -> None:
    report = get_report(adaround(prepared("fx", None, Net), samples(), QUICK, progress=False))
    assert report.versions == {"adaround_plugin": adaround_plugin.__version__, "torch": torch.__version__}
    assert json.loads(report.to_json())["settings"] == report.settings
    assert all(type(value) is str for value in (*report.settings.values(), *report.versions.values()))


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """The same integers and the same grids."""
    one, other = learned_weights(first), learned_weights(second)
    assert one.keys() == other.keys()
    for name, (integers, grid) in one.items():
        assert torch.equal(integers, other[name][0])
        assert torch.equal(grid.scale, other[name][1].scale)
        assert torch.equal(grid.zero_point, other[name][1].zero_point)
