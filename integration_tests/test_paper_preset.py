"""The paper preset beside an independent implementation of the paper's equations, on a network trained here."""

from __future__ import annotations

import statistics
from dataclasses import replace

from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx
from torch.fx.experimental.optimization import fuse

from adaround_plugin import adaround, demo, get_adaround_qconfig_mapping, get_weight_only_backend_config
from adaround_plugin.solvers import Relaxation
from integration_tests.independent_adaround import adaround_as_published, nearest

BITS, ITERATIONS, RATE, SEEDS = 2, 300, 2e-2, range(3)


def test_the_paper_preset_is_as_accurate_as_an_independent_implementation():
    digits = demo.load()
    model = demo.train(demo.network(), digits, epochs=8)
    images = digits.images[:256]
    batches = list(images.split(64))
    backend = get_weight_only_backend_config()
    mapping = get_adaround_qconfig_mapping("x86", BITS, activation_bits=None, per_channel=False)
    prepared = prepare_fx(model, mapping, (batches[0],), backend_config=backend)
    for batch in batches:
        prepared(batch)
    ours = []
    for seed in SEEDS:
        solver = replace(Relaxation(), iterations=ITERATIONS, learning_rate=RATE, seed=seed)
        learned = adaround(prepared, batches, preset="paper", solver=solver, progress=False)
        ours.append(demo.accuracy(convert_to_reference_fx(learned, backend_config=backend), digits))
    folded = fuse(model)
    relu = {name for name, _ in folded.named_modules()} - {"15", "17"}
    theirs = [
        demo.accuracy(adaround_as_published(folded, BITS, images, relu.__contains__, ITERATIONS, RATE, seed), digits)
        for seed in SEEDS
    ]
    plain = demo.accuracy(nearest(folded, BITS), digits)
    # a difference of one test image is noise, whatever the seeds say
    deviation = max(statistics.stdev(theirs), statistics.stdev(ours), 100 / 797)
    assert plain < min(theirs + ours) - 5
    assert abs(statistics.mean(ours) - statistics.mean(theirs)) <= deviation
