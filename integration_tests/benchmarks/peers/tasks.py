"""What peers are compared on: a float network with its batch norms folded, samples to calibrate with, and a judge.

All results are judged here, whoever made them: their weights and biases are put into the same network.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from integration_tests.benchmarks import glyphs, networks, recognizer
from integration_tests.benchmarks.accuracy import TEST_IMAGES, TEST_SEED
from integration_tests.benchmarks.peers.exchange import Weights, layers

__all__ = ["TASKS", "Decoder", "Glyphs", "MiniLM", "Recognizer", "Task", "filled", "folded", "levels"]

# how far a weight may lie from its grid, in steps: float32 keeps seven digits
_TOLERANCE = 1e-2
# images that run at once: values of more leave the processor's caches
_AT_ONCE = 100


class Task(Protocol):
    """A network with data."""

    def network(self) -> nn.Module:
        """The float network, batch norms folded."""
        ...

    def samples(self, count: int, seed: int) -> list[Any]:
        """Batches to calibrate with."""
        ...

    def judge(self, other: nn.Module) -> dict[str, float]:
        """`score` in percent, or perplexity, and `divergence` from the float network."""
        ...


def folded(network: nn.Module) -> nn.Module:
    """A copy in which each batch norm is in the convolution before it: the same function but for rounding errors."""
    made = copy.deepcopy(network).eval()
    for node in fx.symbolic_trace(made).graph.nodes:
        norm = made.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(norm, nn.BatchNorm2d):
            convolution = made.get_submodule(node.args[0].target)
            assert isinstance(convolution, nn.Conv2d)
            made.set_submodule(node.args[0].target, fuse_conv_bn_eval(convolution, norm))
            made.set_submodule(node.target, nn.Identity())
    return made


def filled(network: nn.Module, made: Weights) -> nn.Module:
    """A copy of the network with the weights and biases that a peer made.

    Raises:
        ValueError: if the layers are not those of the network.
    """
    other = copy.deepcopy(network)
    expected = dict(layers(other))
    if made.keys() != expected.keys():
        raise ValueError(f"layers differ from the network's: {sorted(made.keys() ^ expected.keys())}")
    for name, module in expected.items():
        weight, bias = made[name]
        module.weight = nn.Parameter(weight.reshape(module.weight.shape), requires_grad=False)
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return other


def levels(weight: Tensor, most: int) -> int:
    """The fewest points of a uniform grid that all rows of a weight `(rows, ...)` lie on, row by row.

    Each row has a grid of its own. `most + 1` where a row is on no grid of `most` points.
    """
    rows = weight.detach().double().flatten(1)
    low = rows.amin(1, keepdim=True)
    span = (rows.amax(1, keepdim=True) - low).clamp(min=torch.finfo(torch.float64).tiny)
    needed = torch.full((len(rows),), most + 1)
    for points in range(most, 1, -1):
        steps = (rows - low) / span * (points - 1)
        needed[(steps - steps.round()).abs().amax(1) < _TOLERANCE] = points
    return int(needed.max())


@torch.no_grad()
def _log_shares(network: nn.Module, images: Tensor) -> Tensor:
    """Logarithms of the shares of classes: (n, classes)."""
    return torch.cat([network(batch).log_softmax(1) for batch in torch.split(images, _AT_ONCE)])


@dataclass(frozen=True)
class Glyphs:
    """One of the glyph networks: top-1 and divergence on the test images of all tables."""

    name: str

    @lru_cache(maxsize=2)  # noqa: B019
    def network(self) -> nn.Module:
        return folded(networks.load(self.name))

    def samples(self, count: int, seed: int) -> list[Any]:
        return list(torch.split(glyphs.load("train", count, seed=seed)[0], 64))

    @lru_cache(maxsize=1)  # noqa: B019
    def _test(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels, and the float network's log shares."""
        images, labels = glyphs.load("test", TEST_IMAGES, seed=TEST_SEED)
        return images, labels, _log_shares(self.network(), images)

    def judge(self, other: nn.Module) -> dict[str, float]:
        images, labels, exact = self._test()
        found = _log_shares(other, images)
        right = int((found.argmax(1) == labels).sum())
        apart = float(F.kl_div(found, exact, log_target=True, reduction="batchmean"))
        return {"score": 100 * right / len(labels), "divergence": apart}


@dataclass(frozen=True)
class Recognizer:
    """The text recognizer: characters right and divergence on 400 unseen lines."""

    @lru_cache(maxsize=2)  # noqa: B019
    def network(self) -> nn.Module:
        return folded(recognizer.load())

    def samples(self, count: int, seed: int) -> list[Any]:
        return list(torch.split(recognizer.lines(count, "train", seed)[0], recognizer.BATCH))

    def judge(self, other: nn.Module) -> dict[str, float]:
        found = recognizer.score(self.network(), other, *recognizer.lines(400, "test"))
        return {"score": found.right, "divergence": found.divergence}


@dataclass(frozen=True)
class MiniLM:
    """The pretrained transformer: mean cosine of unseen sentences with the float model, and what it lacks to 1."""

    @lru_cache(maxsize=1)  # noqa: B019
    def _loaded(self) -> tuple[nn.Module, list[Any], list[Any]]:
        """The encoder, and sentences to calibrate with and to judge by."""
        # transformers takes seconds to import, and the other tasks do without
        from integration_tests.benchmarks import minilm

        model, tokenizer = minilm.load()
        texts = minilm.sentences()
        unseen = minilm.tokenized(tokenizer, texts[-minilm.UNSEEN :])
        return model.encoder, minilm.tokenized(tokenizer, texts[: -minilm.UNSEEN]), unseen

    def network(self) -> nn.Module:
        return self._loaded()[0]

    def samples(self, count: int, seed: int) -> list[Any]:
        if seed != 1:
            raise ValueError(f"sentences are drawn once, with seed 1, not {seed}")
        return self._loaded()[1][:count]

    def judge(self, other: nn.Module) -> dict[str, float]:
        from integration_tests.benchmarks import minilm

        exact, found = (
            minilm.embeddings(minilm.HiddenState(encoder), self._loaded()[2]) for encoder in (self.network(), other)
        )
        cosine = float((exact * found).sum(1).mean())
        return {"score": 100 * cosine, "divergence": 1 - cosine}


@dataclass(frozen=True)
class Decoder:
    """The small language model: perplexity of unseen text, and the divergence of its next tokens."""

    @lru_cache(maxsize=1)  # noqa: B019
    def network(self) -> nn.Module:
        # transformers takes seconds to import, and the other tasks do without
        from integration_tests.benchmarks import decoder

        return decoder.load()

    def samples(self, count: int, seed: int) -> list[Any]:
        from integration_tests.benchmarks import decoder

        return [{"input_ids": sequence} for sequence in decoder.sequences("train", count, seed)]

    @lru_cache(maxsize=1)  # noqa: B019
    def _test(self) -> tuple[list[Tensor], list[Tensor]]:
        """Unseen sequences, and the float model's log shares."""
        from integration_tests.benchmarks import decoder

        data = decoder.sequences("test", decoder.UNSEEN)
        return data, [shares for shares, _ in decoder.log_shares(self.network(), data)]

    def judge(self, other: nn.Module) -> dict[str, float]:
        from integration_tests.benchmarks import decoder

        data, exact = self._test()
        loss = apart = 0.0
        for (found, following), of_float in zip(decoder.log_shares(other, data), exact, strict=True):
            loss += float(F.nll_loss(found, following)) / len(data)
            apart += float(F.kl_div(found, of_float, log_target=True, reduction="batchmean")) / len(data)
        return {"score": math.exp(loss), "divergence": apart}


TASKS: dict[str, Task] = {
    **{name: Glyphs(name) for name in networks.BUILDERS},
    "recognizer": Recognizer(),
    "minilm": MiniLM(),
    "decoder": Decoder(),
}
