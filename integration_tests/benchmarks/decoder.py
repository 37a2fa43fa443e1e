"""A small language model: transformers' own Llama classes, trained here on the standard library's documentation.

The text is the docstrings of the standard library and the language reference that `help()` shows. A tenth of the files
is kept out of training, to judge by. Tokenizer, configuration and weights (bfloat16) lie in `checkpoints/decoder`, as
`save_pretrained` writes them. To make them again, in about seven minutes on one core:

    python -m integration_tests.benchmarks.decoder
"""

# transformers imports torchvision where it finds one
from integration_tests.benchmarks import torchvision_cpu  # noqa: F401

# isort: split
import argparse
import ast
import random
import sysconfig
import time
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, fx, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from integration_tests.benchmarks.llama import llama
from integration_tests.benchmarks.networks import CHECKPOINTS

FOLDER: Final = CHECKPOINTS / "decoder"
TOKENS: Final = 256
END: Final = "<|end|>"
VOCABULARY: Final = 1024
# sequences to judge by
UNSEEN: Final = 192
STEPS, BATCH, PEAK_RATE = 500, 16, 4e-3
_NOT_DOCUMENTED = {"test", "tests", "idle_test", "site-packages", "ensurepip", "lib2to3"}

Split = Literal["train", "test"]


def texts(split: Split) -> list[str]:
    """Docstrings of the files of a split, and pages of the reference, shuffled with a fixed seed."""
    found = [text for name, text in _documents() if (zlib.crc32(name.encode()) % 10 == 0) == (split == "test")]
    random.Random(0).shuffle(found)
    return found


def _documents() -> Iterator[tuple[str, str]]:
    """Every docstring of the standard library and every page of the reference, with the name of where it stands."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_DOCUMENTED & set(name.parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if text := ast.get_docstring(node):
                yield name.as_posix(), text
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the checkpoint."""
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(FOLDER)
    return loaded


@cache
def tokens(split: Split) -> Tensor:
    """The texts of a split as one row of token ids, each ended by `END`: int64."""
    encoded = tokenizer()([text + END for text in texts(split)])["input_ids"]
    return torch.tensor([token for text in encoded for token in text])


def sequences(split: Split, count: int, seed: int = 0) -> list[Tensor]:
    """Sequences `(1, TOKENS)` of a split: drawn with a seed from those to train on, the first of those to judge by."""
    whole = tokens(split)
    if split == "test":
        return list(whole[: count * TOKENS].reshape(count, 1, TOKENS))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(whole) - TOKENS, (count,), generator=generator)
    return [whole[start : start + TOKENS].unsqueeze(0) for start in starts.tolist()]


def load() -> nn.Module:
    """The trained model, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    made: nn.Module = model.eval()
    return made


class Logits(nn.Module):
    """A language model as a function of token ids `(batch, tokens)`, to `(batch, tokens, vocabulary)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def export(network: nn.Module, batch: dict[str, Tensor]) -> fx.GraphModule:
    """The model as a graph of ATen operators, for sequences of any number and length."""
    sizes = {0: torch.export.Dim("sequences", min=1, max=1024), 1: torch.export.Dim("tokens", min=2, max=2 * TOKENS)}
    # an axis of one entry would be taken for one that always has one
    two = {name: torch.cat([value, value]) for name, value in batch.items()}
    shapes = dict.fromkeys(two, sizes)
    module = torch.export.export(network, (), kwargs=two, dynamic_shapes=shapes, strict=True).module()
    assert isinstance(module, fx.GraphModule)
    return module


@torch.no_grad()
def log_shares(model: nn.Module, data: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each sequence the logarithms of the shares of next tokens, `(tokens - 1, vocabulary)`, and what came next."""
    for sequence in data:
        yield model(sequence).logits[0, :-1].float().log_softmax(-1), sequence[0, 1:]


def perplexity(model: nn.Module, data: list[Tensor]) -> float:
    """Of the next tokens of sequences of one length."""
    losses = [F.nll_loss(shares, following) for shares, following in log_shares(model, data)]
    return float(torch.stack(losses).double().mean().exp())


def _trained_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs, of the texts to train on."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts("train"), trainer)
    build: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = build(tokenizer_object=made, eos_token=END, pad_token=END)
    return wrapped


def _untrained() -> LlamaForCausalLM:
    return llama(
        4,
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=2 * TOKENS,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.02,
    )


def train() -> Any:
    """Train the model from scratch; the tokenizer is there."""
    model: Any = _untrained().train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, PEAK_RATE, total_steps=STEPS, pct_start=0.1, cycle_momentum=False
    )
    progress = tqdm(range(STEPS), mininterval=5.0)
    for step in progress:
        batch = torch.cat(sequences("train", BATCH, seed=1_000_000 + step))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: Tensor = model(batch).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def main() -> None:
    """Train, write the checkpoint, and print the perplexity of the model as reloaded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    _trained_tokenizer().save_pretrained(FOLDER)
    train().bfloat16().save_pretrained(FOLDER)
    seconds = time.perf_counter() - start
    model = load()
    count = sum(parameter.numel() for parameter in model.parameters())
    found = perplexity(model, sequences("test", UNSEEN))
    known = perplexity(model, sequences("train", UNSEEN))
    print(f"{count:,} parameters, perplexity {found:.2f} of unseen text, {known:.2f} of known text, {seconds:.0f} s")


if __name__ == "__main__":
    main()
