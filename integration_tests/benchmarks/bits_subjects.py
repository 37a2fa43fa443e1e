"""Networks to share out bits in: how each is prepared with bits for single layers, and how the result is judged.

Glyph networks, the text recognizer and CREPE go through FX, the transformer through PT2E. Weights alone, symmetric, per
channel; data and scores are those of each network's own benchmark.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from integration_tests.benchmarks import networks, recognizer
from integration_tests.benchmarks.accuracy import Case
from integration_tests.benchmarks.peers.tasks import TASKS, Task, filled

__all__ = ["IMAGES", "SUBJECTS", "Subject"]

# of glyphs
IMAGES = 1024


@dataclass(frozen=True)
class Subject:
    """A network with data.

    Attributes:
        batches: to analyse and to learn from.
        few: of these, those that layers are measured on alone.
        prepare: the prepared and calibrated model with bits of layers, by name; 4 where none are given.
        judge: of the model that `adaround` returned, the divergence from the float network, and the score in percent.
        score: what the score is.
        divergence: what the divergence is.
        samples: how many there are, for peers that search for bits; None where none does.
    """

    batches: list[Any]
    few: list[Any]
    prepare: Callable[[Mapping[str, int]], fx.GraphModule]
    judge: Callable[[fx.GraphModule], tuple[float, float]]
    score: str
    divergence: str = "divergence"
    samples: int | None = None


def _through_fx(
    network: nn.Module,
    batches: list[Any],
    few: list[Any],
    judge: Callable[[nn.Module], tuple[float, float]],
    **said: Any,
) -> Subject:
    case = Case(network, 4, activation_bits=None)
    return Subject(
        batches,
        few,
        lambda bits: replace(case, layers=bits).prepare(batches),
        lambda learned: judge(case.convert(learned)),
        **said,
    )


def _judge(task: Task) -> Callable[[nn.Module], tuple[float, float]]:
    def judge(other: nn.Module) -> tuple[float, float]:
        found = task.judge(other)
        return found["divergence"], found["score"]

    return judge


def _glyphs(name: str) -> Subject:
    task = TASKS[name]
    batches = task.samples(IMAGES, 1)
    few = list(torch.split(torch.cat(batches)[:256], 128))
    # prepare_fx leaves its configurations in the modules, and peers' processes cannot read them
    network = copy.deepcopy(task.network())
    return _through_fx(network, batches, few, _judge(task), score="top-1 %", samples=IMAGES)


def _recognizer() -> Subject:
    task = TASKS["recognizer"]
    batches = task.samples(recognizer.LINES, 1)
    return _through_fx(
        task.network(), batches, batches[:2], _judge(task), score="characters %", samples=recognizer.LINES
    )


def _crepe() -> Subject:
    from integration_tests.benchmarks import crepe
    from integration_tests.benchmarks.floor_models import crepe as load
    from integration_tests.benchmarks.floor_models import tones

    network = load()
    test = tones(2000, crepe.TEST_SEED)
    exact = crepe.logits(network, test)

    def judge(other: nn.Module) -> tuple[float, float]:
        found = crepe.score(exact, crepe.logits(other, test))
        return found.error, found.agreement

    batches = list(torch.split(tones(crepe.FRAMES), crepe.BATCH))
    return _through_fx(network, batches, batches[:4], judge, score="within 50 cents %", divergence="logit error")


def _minilm() -> Subject:
    # transformers takes seconds to import
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
    from integration_tests.benchmarks import minilm
    from integration_tests.benchmarks.peers.ours import of_pt2e

    task = TASKS["minilm"]
    encoder, batches, judge = task.network(), task.samples(160, 1), _judge(task)

    def prepare(bits: Mapping[str, int]) -> fx.GraphModule:
        layers = {name: {"weight_bits": of_layer} for name, of_layer in bits.items()}
        quantizer = AdaRoundWeightOnlyQuantizer(layers, weight_bits=4, symmetric=True, linear_only=True)
        prepared: fx.GraphModule = prepare_pt2e(minilm.export(minilm.HiddenState(encoder), batches[0]), quantizer)
        with torch.no_grad():
            prepared(**batches[0])  # the observers of weights, which any batch sets
        return prepared

    def judged(learned: fx.GraphModule) -> tuple[float, float]:
        return judge(filled(encoder, of_pt2e(encoder, convert_pt2e(learned))))

    return Subject(batches, batches[:64], prepare, judged, score="100 cosine", divergence="1 - cosine")


SUBJECTS: dict[str, Callable[[], Subject]] = {
    **{name: partial(_glyphs, name) for name in networks.BUILDERS},
    "recognizer": _recognizer,
    "crepe": _crepe,
    "minilm": _minilm,
}
