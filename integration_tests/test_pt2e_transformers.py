"""Models of transformers through PT2E: small ones with random weights, the five that most others are built like."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from adaround_plugin import adaround, get_report
from integration_tests.benchmarks.transformers_models import MODELS, batches, export, prepare, quantizer
from integration_tests.models import learn

# what transformers keeps in a global while it runs a model; the exported program does without
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")

BITS, LOW, HIGH = 3, -4, 3
# (name, whether activations are quantized, quantized weights)
# whose recipe is chosen by trials; one is given to the others
OPEN = ("GPT-2", "ViT")
CASES = [("BERT", True, 12), ("ViT", True, 14), ("Llama", False, 15), ("GPT-2", False, 9), ("ResNet", False, 11)]


@functools.cache
def program_of(name: str) -> fx.GraphModule:
    """The exported model; not to be changed."""
    return export(MODELS[name])


def learned_weights(converted: fx.GraphModule) -> list[torch.Tensor]:
    """The integers of every weight that a converted program holds per channel."""
    calls = [node for node in converted.graph.nodes if "dequantize_per_channel" in str(node.target)]
    return [getattr(converted, str(call.args[0].target)) for call in calls]


def embedding_weight(program: fx.GraphModule) -> torch.Tensor:
    """The first parameter from which a program looks up rows."""
    call = next(node for node in program.graph.nodes if node.target == torch.ops.aten.embedding.default)
    return program.get_parameter(str(call.args[0].target))


@pytest.mark.parametrize(("name", "activations", "weights"), CASES, ids=[case[0] for case in CASES])
def test_a_model_learns_and_converts_at_three_bits(name: str, activations: bool, weights: int) -> None:
    case = MODELS[name]
    data = batches(case)[:4]
    program = program_of(name)
    prepared = prepare(program, quantizer(case, BITS, activations), data)
    nearest = get_report(adaround(prepared, data, "nearest", progress=False))
    learned = adaround(prepared, data, progress=False) if name in OPEN else learn(prepared, data)
    report = get_report(learned)
    assert len(report.layers) == weights
    assert report.output_error < nearest.output_error

    converted = convert_pt2e(learned)
    integers = learned_weights(converted)
    assert len(integers) == weights
    assert all(int(values.min()) >= LOW and int(values.max()) <= HIGH for values in integers)
    fresh = batches(case, seed=1)[0][:5]
    with torch.no_grad():
        output, exact = converted(fresh), program(fresh)
    assert output.shape == exact.shape
    # learned on random weights and few samples: the output must follow the float model's, not equal it
    assert float((output - exact).square().mean() / exact.var()) < 0.5


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_an_embedding_tied_to_the_head_keeps_its_float_weight(name: str) -> None:
    case = MODELS[name]
    data = batches(case)[:1]
    program = program_of(name)
    before = embedding_weight(program).clone()
    prepared = prepare(program, quantizer(case, BITS, activations=False), data)
    learned = adaround(prepared, data, "nearest", progress=False)
    head = next(layer for layer in get_report(learned).layers if tuple(layer.shape) == tuple(before.shape))
    assert head.bits == BITS
    converted = convert_pt2e(learned)
    assert torch.equal(embedding_weight(converted), before)


def test_products_of_conv1d_are_reported_as_left_alone() -> None:
    case = MODELS["GPT-2, Conv1D kept"]
    data = batches(case)[:1]
    prepared = prepare(program_of("GPT-2, Conv1D kept"), quantizer(case, BITS, activations=False), data)
    report = get_report(adaround(prepared, data, "nearest", progress=False))
    assert [kind for _, kind, _ in report.skipped].count("aten.addmm") == 8
