"""The progress bar: stages one after the other, each to its end, on stderr, and silent if so asked."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from adaround_plugin import Finetune, adaround, analyze
from integration_tests.models import prepared_model

NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
DATA = list(torch.rand(8, 8, 3, 6, 6, generator=torch.Generator().manual_seed(0)))


def stages(told: str) -> list[tuple[str, str, str, str]]:
    """Name, units done, all units and what was told last, of each stage at its end, in order."""
    found = {}
    for line in re.split(r"[\r\n]+", told):
        if shown := re.match(r"AdaRound, ([a-z ]+):.*? (\d+)/(\d+) \[.*?(?:/s|/[a-z]+|\?)(?:, (.*))?\]", line):
            found[shown[1]] = shown.groups()
    return list(found.values())


def test_every_stage_is_shown_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepared_model(NET, DATA)
    adaround(prepared, DATA, finetune=Finetune(iterations=100))
    printed = capsys.readouterr()
    assert printed.out == ""
    choosing, learning, finetuning = stages(printed.err)
    assert choosing[:3] == ("choosing a recipe", "4", "4")
    assert learning[:3] == ("learning", "2", "2")
    assert re.match(r"3 \d\.\d\de-\d\d -> \d\.\d\de-\d\d", learning[3])
    assert finetuning[:3] == ("finetuning", "100", "100")


def test_an_analysis_shows_layers_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    analyze(prepared_model(NET, DATA), DATA, bits=(2, 8))
    rounding, derivatives = stages(capsys.readouterr().err)
    assert rounding == ("rounding", "2", "2", "3")
    assert derivatives[:3] == ("taking derivatives", "64", "64")


def test_nothing_is_shown_if_so_asked(capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepared_model(NET, DATA)
    adaround(prepared, DATA, finetune=Finetune(iterations=2), progress=False)
    analyze(prepared, DATA, bits=(2, 8), progress=False)
    assert tuple(capsys.readouterr()) == ("", "")
