"""One measurement of the paper's tables on a network of this repository: a cell, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import QConfig
from torch.ao.quantization.observer import MinMaxObserver
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

from adaround_plugin import get_adaround_qconfig_mapping, get_weight_only_backend_config
from adaround_plugin.equalization.equalize import equalize
from adaround_plugin.paper.forms import LayerForms
from adaround_plugin.paper.task_loss import TaskLoss
from integration_tests.benchmarks import glyphs, networks, scenes, segmenter
from integration_tests.benchmarks.accuracy import accuracy
from integration_tests.benchmarks.paper_methods import METHODS, Budget, Task, output_grid_mapping

__all__ = ["BITS", "Bench", "Cell", "Origin"]

Origin = Literal["training", "similar", "other"]

# Bits at which rounding to nearest with one scale per weight loses much, as 4 bits do on the paper's networks. At
# 4 / 3 / 2 bits it leaves 90.1 / 46.7 / 2.1 of the resnet20's 91.5 %, 86.3 / 67.1 / 1.4 of the mobilenet's 90.0 %,
# 89.7 / 88.5 / 32.4 of the vit's 90.0 % (top-1 of 2,000 images that no table is scored on), and 60.4 / 39.9 / 11.0 of
# the segmenter's 65.2 % mean IoU.
BITS: Final = {"resnet20": 3, "mobilenet": 3, "vit": 2, "segmenter": 3}

_BATCH = 64
# a scene has four times the pixels of a glyph
_PIXELS = (scenes.SCENE_SIZE // glyphs.IMAGE_SIZE) ** 2


@dataclass(frozen=True)
class Cell:
    """What is measured, but for seed and budget.

    Attributes:
        method: a key of `METHODS`, or "float".
        network: "resnet20", "mobilenet", "vit" or "segmenter".
        per_channel: one scale per output channel, else one per weight.
        first: quantize only the first layer.
        activations: quantize activations to 8 bits, by their least and greatest value.
        scale: by which the weights' scales are chosen before rounding is learned.
        equalized: equalize the network across layers first.
        images: calibration images; None for the budget's.
        origin: of the calibration images.
        bits: of the weights; None for those that the network is run at.
    """

    method: str
    network: str = "resnet20"
    per_channel: bool = False
    first: bool = False
    activations: bool = False
    scale: Literal["mse", "minmax", "output"] = "mse"
    equalized: bool = False
    images: int | None = None
    origin: Origin = "training"
    bits: int | None = None

    @property
    def seeded(self) -> bool:
        """Whether the score depends on the seed: on the calibration images, or on draws."""
        plain = self.method in ("float", "nearest", "floor", "ceil")
        return not plain or self.activations or self.scale == "output"


def _scenes(images: int) -> int:
    """How many scenes stand for so many images."""
    return max(1, images // _PIXELS)


@lru_cache(maxsize=8)
def _test_set(network: str, count: int) -> tuple[Tensor, Tensor]:
    """Images and labels to score on; no choice in the making of the method has seen those of this seed."""
    if network == "segmenter":
        return scenes.load("test", _scenes(count), 1)
    return glyphs.load("test", count, seed=1)


@lru_cache(maxsize=8)
def _calibration(network: str, origin: Origin, count: int, seed: int) -> Tensor:
    """Calibration images `(count, 1, H, W)`."""
    if network == "segmenter":
        return scenes.load("train", _scenes(count), 1 + seed)[0]
    if origin == "training":
        return glyphs.load("train", count, seed=1 + seed)[0]
    if origin == "similar":
        # what is seen of some overlapping glyphs through a window of a glyph's size
        margin = (scenes.SCENE_SIZE - glyphs.IMAGE_SIZE) // 2
        images, _ = scenes.load("train", count, 1 + seed)
        window = slice(margin, margin + glyphs.IMAGE_SIZE)
        return images[:, :, window, window].contiguous()
    # scikit-learn is an extra
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(seed))[:count]
    small = torch.from_numpy(digits.images).float()[order].unsqueeze(1) / 16
    large = nn.functional.interpolate(small, size=glyphs.IMAGE_SIZE, mode="bilinear")
    return (large - 0.5) / 0.25


@lru_cache(maxsize=8)
def _task_loss(network: str, count: int, seed: int) -> TaskLoss:
    """The cross-entropy of labelled training images to second order in the first layer of the float network."""
    images, labels = glyphs.load("train", count, seed=1 + seed)

    def loss(run: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(run(batch[0]), batch[1], reduction="none")

    mapping, backend = get_adaround_qconfig_mapping(activation_bits=None), get_weight_only_backend_config()
    model = networks.load(network)
    prepared = prepare_fx(model, mapping, (images,), backend_config=backend)
    form = LayerForms.of(prepared, _weighted(model)[0], backend)
    return form.expand(loss, list(zip(torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True)))


@dataclass(frozen=True)
class Bench:
    """Runs cells under one budget.

    Attributes:
        budget: of calibration, of learning and of scoring.
        bits: of the weights, by network.
    """

    budget: Budget
    bits: dict[str, int]

    def key(self, cell: Cell, seed: int) -> dict[str, Any]:
        """All that the score depends on, as plain data."""
        chosen = {"seed": seed, "bits": self._bits(cell), "images": cell.images or self.budget.images}
        return {**asdict(self.budget), **asdict(cell), **chosen}

    def _bits(self, cell: Cell) -> int:
        return self.bits[cell.network] if cell.bits is None else cell.bits

    def resolution(self, table: str) -> float:
        """What one test image is worth in a table, in points."""
        return 100 / (_scenes(self.budget.test_images) if table == "9" else self.budget.test_images)

    def score(self, cell: Cell, seed: int) -> float:
        """Run a cell: top-1, or for the segmenter the mean IoU, of the model that the host converted, in percent."""
        network: nn.Module = segmenter.load() if cell.network == "segmenter" else networks.load(cell.network)
        if cell.method == "float":
            return self._metric(cell.network, network)
        count = cell.images or self.budget.images
        batches = list(torch.split(_calibration(cell.network, cell.origin, count, seed), _BATCH))
        if cell.equalized:
            network = equalize(network, (batches[0],))
        prepared, backend = self._prepared(cell, network, batches)
        expansion = partial(_task_loss, cell.network, self.budget.hessian_images, seed)
        task = Task(prepared, batches, backend, _weighted(network)[0], expansion, self.budget, seed)
        learned = METHODS[cell.method](task)
        return self._metric(cell.network, convert_to_reference_fx(learned, backend_config=backend))

    def _prepared(self, cell: Cell, network: nn.Module, batches: list[Tensor]) -> tuple[fx.GraphModule, Any]:
        """The calibrated model, and its backend configuration."""
        backend = None if cell.activations else get_weight_only_backend_config()
        mapping = get_adaround_qconfig_mapping(
            weight_bits=self._bits(cell),
            activation_bits=8 if cell.activations else None,
            per_channel=cell.per_channel,
        )
        own = cast(QConfig, mapping.global_qconfig)
        weight = own.weight.with_args(scale="minmax") if cell.scale == "minmax" else own.weight
        activation = MinMaxObserver.with_args(dtype=torch.quint8) if cell.activations else own.activation
        mapping.set_global(QConfig(activation=activation, weight=weight))  # type: ignore[no-untyped-call]
        if cell.first:
            for name in _weighted(network)[1:]:
                mapping.set_module_name(name, None)
        prepared = prepare_fx(network, mapping, (batches[0],), backend_config=backend)
        if cell.scale == "output":
            mapping = output_grid_mapping(mapping, prepared, _weighted(network)[0], batches, backend)
            prepared = prepare_fx(network, mapping, (batches[0],), backend_config=backend)
        with torch.no_grad():
            for batch in batches:
                prepared(batch)
        return prepared, backend

    def _metric(self, name: str, network: nn.Module) -> float:
        images, labels = _test_set(name, self.budget.test_images)
        metric: Callable[[nn.Module, Tensor, Tensor], float] = scenes.mean_iou if name == "segmenter" else accuracy
        return metric(network, images, labels)


def _weighted(network: nn.Module) -> list[str]:
    """Names of the convolutions and linear layers, in the order of the modules."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
