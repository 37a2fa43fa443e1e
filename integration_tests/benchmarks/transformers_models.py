"""What runs: small models of transformers with random weights, through PT2E and `adaround`, at few bits.

Each is exported, prepared with AdaRoundWeightOnlyQuantizer or, for 8-bit activations, X86InductorQuantizer, learned
and converted; the converted program is run. Weights are random: the errors show that learning works on the graph. They
say nothing of the accuracy of a trained model.

    python -m integration_tests.benchmarks.transformers_models
"""

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401
from integration_tests.benchmarks.quiet import quiet

# isort: split
import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.pytorch_utils import Conv1D

from adaround_plugin import adaround, get_report
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer, get_adaround_x86_inductor_config

BATCHES, BATCH_SIZE = 8, 16
VOCABULARY, CLASSES = 100, 10
# two layers, 32 wide; weights from initialization are scaled so that the layers matter beside the residual stream
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 0, "eos_token_id": 1}
IMAGE: dict[str, Any] = {
    **{name: value for name, value in TEXT.items() if name != "vocab_size"},
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Case:
    """A model and its input.

    Attributes:
        build: makes the model.
        argument: name of its input.
        shape: shape of one sample; of token ids where `argument` is `input_ids`.
        left_out: functions that the quantizer leaves alone where activations are quantized.
    """

    build: Callable[[], nn.Module]
    argument: str
    shape: tuple[int, ...]
    left_out: tuple[Callable[..., Any], ...] = ()


def with_linear(model: nn.Module) -> nn.Module:
    """Replace each Conv1D of transformers, in place, by the same function as nn.Linear.

    Conv1D keeps its weight as (in, out) and exports as aten.addmm, which no quantizer of torchao annotates.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=64, n_layers=2, n_heads=4, initializer_range=0.2
    )
    return transformers.DistilBertModel(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, is_encoder_decoder=False
    )
    return transformers.T5EncoderModel(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(**IMAGE)
    config.num_labels = CLASSES
    return transformers.ViTForImageClassification(config)


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    config.num_labels = CLASSES
    return transformers.ResNetForImageClassification(config)


def _convnext() -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[16, 32],
        depths=[2, 2],
        num_stages=2,
        initializer_range=0.2,
        layer_scale_init_value=1.0,
    )
    config.num_labels = CLASSES
    return transformers.ConvNextForImageClassification(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        max_source_positions=16,
        num_mel_bins=8,
        init_std=0.2,
    )
    return WhisperEncoder(config)


_IDS, _PIXELS = ("input_ids", (16,)), ("pixel_values", (3, 16, 16))
MODELS: dict[str, Case] = {
    "BERT": Case(lambda: transformers.BertModel(transformers.BertConfig(**TEXT), add_pooling_layer=False), *_IDS),
    "RoBERTa": Case(
        lambda: transformers.RobertaModel(transformers.RobertaConfig(**TEXT), add_pooling_layer=False),
        *_IDS,
        # position ids are a product of integers, which the quantizer's observer cannot take
        left_out=(torch.mul,),
    ),
    "DistilBERT": Case(_distilbert, *_IDS),
    "T5 encoder": Case(_t5, *_IDS),
    "GPT-2": Case(lambda: with_linear(_gpt2()), *_IDS),
    "GPT-2, Conv1D kept": Case(_gpt2, *_IDS),
    "Llama": Case(
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, tie_word_embeddings=True)), *_IDS
    ),
    "Mistral": Case(lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER)), *_IDS),
    "Qwen2": Case(lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER)), *_IDS),
    "ViT": Case(_vit, *_PIXELS),
    "CLIP vision": Case(
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE, initializer_factor=5.0)), *_PIXELS
    ),
    "ResNet": Case(_resnet, "pixel_values", (3, 32, 32)),
    "ConvNeXt": Case(_convnext, "pixel_values", (3, 32, 32)),
    "Whisper encoder": Case(_whisper, "input_features", (8, 32)),
}


class FirstOutput(nn.Module):
    """A model of transformers as a function of one tensor that returns its first output: hidden states or logits."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(**{self.argument: x})[0]
        return output


def batches(case: Case, seed: int = 0) -> list[Tensor]:
    """Random batches for a model."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH_SIZE, *case.shape)
    if case.argument == "input_ids":
        # from 2: RoBERTa takes id 1 for padding
        return [torch.randint(2, VOCABULARY, shape, generator=generator) for _ in range(BATCHES)]
    return [torch.randn(shape, generator=generator) for _ in range(BATCHES)]


def export(case: Case) -> fx.GraphModule:
    """The model as a graph of ATen operators, for batches of any size."""
    torch.manual_seed(0)
    model = FirstOutput(case.build(), case.argument).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    program = torch.export.export(model, (batches(case)[0],), strict=True, dynamic_shapes=shapes)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def quantizer(case: Case, bits: int, activations: bool) -> Quantizer:
    """The quantizer of a row of the table."""
    if not activations:
        return AdaRoundWeightOnlyQuantizer(weight_bits=bits)
    chosen = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(bits))
    for function in case.left_out:
        chosen.set_function_type_qconfig(function, None)
    return chosen


def prepare(program: fx.GraphModule, chosen: Quantizer, data: list[Tensor]) -> fx.GraphModule:
    """Prepare a copy of an exported program, and calibrate it."""
    prepared = prepare_pt2e(copy.deepcopy(program), chosen)
    assert isinstance(prepared, fx.GraphModule)
    with torch.no_grad():
        for batch in data:
            prepared(batch)
    return prepared


def rows(name: str, case: Case, bits: list[int]) -> Iterator[list[str]]:
    """A table row for each way to quantize activations; a reason where the model does not run."""
    data = batches(case)
    try:
        program = export(case)
    except Exception as error:
        yield [name, "", "", "", *[_reason(error)] + [""] * (len(bits) - 1), ""]
        return
    for activations in (False, True):
        start = time.process_time()
        errors: list[str] = []
        learned, left = "", ""
        for width in bits:
            try:
                prepared = prepare(program, quantizer(case, width, activations), data)
                reports = []
                for method in ("nearest", "default"):
                    model = adaround(prepared, data, method, progress=False)
                    reports.append(get_report(model))
                    with torch.no_grad():
                        convert_pt2e(model)(data[0][:3])
                learned = str(len(reports[1].layers))
                kinds = Counter(kind for _, kind, _ in reports[1].skipped)
                left = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
                errors.append(" / ".join(f"{report.output_error:.4f}" for report in reports))
            except Exception as error:
                errors.append(_reason(error))
        seconds = time.process_time() - start
        yield [name, "8 bits" if activations else "float", learned, left, *errors, f"{seconds:.0f}"]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".replace("|", "/")


@quiet()
def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help=f"of {list(MODELS)}; all without")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    head = ["model", "activations", "learned", "left alone", *(f"W{b}: nearest / learned" for b in options.bits)]
    head.append("CPU s")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in options.models or MODELS:
        for row in rows(name, MODELS[name], options.bits):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
