"""The benchmarks' networks and data work, and a small run of them shows what the large ones measure."""

import torch

from adaround_plugin import adaround
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import Case, accuracy
from integration_tests.benchmarks.resnet18 import set_statistics


def test_two_bits_keep_the_accuracy_that_nearest_loses() -> None:
    network = networks.load("resnet20")
    images, labels = (part[:1000] for part in glyphs.load("test", 1000))
    calibration, _ = glyphs.load("train", 64, seed=1)
    batches = list(calibration.split(32))
    case = Case(network, bits=2, activation_bits=None)
    prepared = case.prepare(batches)
    score = {}
    for solver in ("nearest", "annealing"):
        learned = adaround(prepared, batches, solver=solver, column_weighting="none", max_columns=4096, progress=False)
        score[solver] = accuracy(case.convert(learned), images, labels)
    exact = accuracy(network, images, labels)
    assert exact > 85
    assert score["annealing"] > exact - 4
    assert score["nearest"] < exact - 50


def test_glyphs_are_the_same_every_time_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (glyphs.load("train", 16, seed=3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(state, torch.get_rng_state())


def test_batch_norm_statistics_are_set_and_the_network_left_in_eval_mode() -> None:
    network = networks.resnet18()
    before = network.bn1.running_mean.clone()
    set_statistics(network, [torch.randn(2, 3, 32, 32)])
    assert not network.training
    assert not torch.equal(before, network.bn1.running_mean)
