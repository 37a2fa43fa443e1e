"""The paper's own steps (`Paper`): each layer relaxed on samples through the host's operators, in FX and PT2E."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from adaround_plugin import LayerWise, Paper, adaround, get_report
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.open import open_host
from adaround_plugin.paper.variants import Sigmoid, StraightThrough, Temperature
from adaround_plugin.report import Report
from adaround_plugin.rounding.schemes import up_or_down
from adaround_plugin.solvers import Annealing
from integration_tests import models
from integration_tests.pairs import pairwise
from integration_tests.region_models import Net, Twice, ZeroPadded, prepared, samples

FAST = Paper(iterations=60, learning_rate=0.1, batch_size=8, regularization=10.0, beta=(8.0, 2.0))


def prepared_net(host: str = "fx", activation_bits: int | None = None, **options: Any) -> fx.GraphModule:
    net = Net if host == "fx" else ZeroPadded
    return prepared(host, activation_bits, net, **{"bits": 2, "count": 48, **options})


@functools.cache
def learned(host: str, activation_bits: int | None = None, bits: int = 2, **options: Any) -> fx.GraphModule:
    """A network learned quickly with some settings, once; not to be changed."""
    method = options.pop("method", None) or replace(FAST, **options)
    return adaround(prepared_net(host, activation_bits, bits=bits), samples(), method, progress=False)


def report(*args: Any, **options: Any) -> Report:
    return get_report(learned(*args, **options))


def same_integers(one: fx.GraphModule, other: fx.GraphModule) -> set[str]:
    """Names of the layers whose integers are the same."""
    found = learned_weights(other)
    return {name for name, (integers, _) in learned_weights(one).items() if torch.equal(integers, found[name][0])}


@pytest.mark.parametrize("host", ["fx", "pt2e"])
@pytest.mark.parametrize("activation", [True, False])
def test_it_is_better_than_nearest_in_every_host(host, activation):
    relaxed = report(host, activation=activation).output_error
    # as Paper does, judged on all samples; measured: 0.1 to 0.5 of nearest's error
    nearest = report(host, method=LayerWise(solver="nearest", holdout=0))
    assert relaxed < 0.6 * nearest.output_error


def test_a_layer_that_is_called_behind_itself_is_learned_before_its_activation_function():
    _, net, data = models.prepared_net("TiedRecursive")
    found = get_report(adaround(net, data, replace(FAST, iterations=5, activation=False), progress=False))
    assert any(block.iterations for block in found.blocks)
    assert found.output_error <= found.nearest_output_error


def test_the_loss_is_taken_behind_the_activation_function_or_before_it():
    same = same_integers(learned("fx", activation=True), learned("fx", activation=False))
    # behind the head there is none
    assert "stem.0" not in same


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_it_is_floor_or_ceil_on_the_observers_scale_with_biases_kept(activation_bits):
    model = prepared_net("fx", activation_bits, bits=4)
    grids = {node.name: (node.grid, node.weight) for node in open_host(model).nodes}
    for name, (integers, grid) in learned_weights(learned("fx", activation_bits, bits=4)).items():
        before, weight = grids[name]
        assert torch.equal(grid.scale, before.scale)
        floor = before.coordinates(weight).floor().long()
        low, high = floor.clamp(-8, 7), (floor + 1).clamp(-8, 7)
        assert ((integers == low) | (integers == high)).all()
    found = report("fx", activation_bits, bits=4)
    assert {layer.bias for layer in found.layers} == {"kept"}
    assert all(layer.nearest_holdout is None for layer in found.layers)


@pytest.mark.parametrize(("variant", "activation_bits"), pairwise([Sigmoid, Temperature, StraightThrough], [None, 8]))
def test_every_variant_is_better_than_nearest(variant, activation_bits):
    error = report("fx", activation_bits, variant=variant).output_error
    assert error < 0.6 * report("fx", activation_bits, method="nearest").output_error


@pytest.mark.parametrize("variant", [None, StraightThrough])
def test_a_solvers_integers_may_be_the_start_and_up_or_down_holds_then_too(variant):
    options = {} if variant is None else {"variant": variant}
    start = {"start": Annealing(), "holdout": 0.125, "correct_bias": True, "search_scale": True, **options}
    model = learned("fx", bits=3, **start)
    weights = {node.name: node.weight for node in open_host(prepared_net(bits=3)).nodes}
    for name, (integers, grid) in learned_weights(model).items():
        lower, upper = up_or_down(grid, weights[name])
        assert ((integers == lower) | (integers == upper)).all()
    blocks = get_report(model).blocks
    assert any(block.learned_holdout < block.start_holdout for block in blocks)
    # FX leaves a functional convolution without a bias as it is
    assert {layer.name for layer in get_report(model).layers if layer.bias == "kept"} == {"weight"}


def test_what_is_worse_on_held_out_samples_is_not_taken():
    # so fast that nothing good can come of it
    wild = {"learning_rate": 30.0, "iterations": 3, "regularization": 0.0, "holdout": 0.125, "start": Annealing()}
    found = report("fx", **wild)
    worse = [block.name for block in found.blocks if block.learned_holdout >= block.start_holdout]
    assert worse
    start = FAST.layers.with_recipe(FAST.layers.recipe)
    start = replace(start, solver=Annealing(), holdout=0.125)
    # the first layer begins as if nothing had been relaxed
    assert worse[0] == found.blocks[0].name
    assert worse[0] in same_integers(learned("fx", **wild), learned("fx", method=start))


@pytest.mark.parametrize("host", ["fx", "pt2e"])
def test_symmetric_reconstruction_learns_from_the_float_input(host):
    same = same_integers(learned(host), learned(host, asymmetric=False))
    assert "stem.0" in same
    assert "b" not in same


def test_the_same_seed_gives_the_same_integers_and_another_seed_others():
    model, method = prepared_net(), replace(FAST, iterations=20, learning_rate=0.1)
    first, second, other = (adaround(model, samples(), method, seed=seed, progress=False) for seed in (0, 0, 1))
    everything = set(learned_weights(first))
    assert same_integers(first, second) == everything
    assert same_integers(first, other) < everything


@pytest.mark.parametrize("batch_size", [16, 5])
def test_a_program_of_one_batch_size_gets_minibatches_of_that_size(batch_size):
    method = replace(FAST, iterations=5, batch_size=batch_size)
    found = get_report(adaround(prepared_net("pt2e", dynamic=False), samples(), method, progress=False))
    assert len(found.blocks) == 7
    assert all(block.iterations == 5 for block in found.blocks)


def test_a_weight_with_two_call_sites_is_learned_from_both():
    model = prepared("fx", None, Twice, bits=2, count=48)
    relaxed, nearest = (get_report(adaround(model, samples(), one, progress=False)) for one in (FAST, "nearest"))
    assert relaxed.output_error < 0.9 * nearest.output_error
    assert relaxed.blocks[0].learned_error < relaxed.blocks[0].start_error


def test_errors_of_layers_are_those_of_what_was_relaxed():
    found = report("fx")
    assert [layer.name for layer in found.layers] == [block.name for block in found.blocks]
    assert all(layer.learned for layer in found.layers)
    # on the moments of the layer's input, without its activation function
    assert sum(layer.learned_error < layer.nearest_error for layer in found.layers) >= 5
    assert sum(block.learned_error < block.start_error for block in found.blocks) >= 5
