"""Train the glyph networks and write their checkpoints.

Run from the repository's root: ``python -m integration_tests.benchmarks.train resnet20 mobilenet vit segmenter``.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from integration_tests.benchmarks import glyphs, networks, scenes, segmenter
from integration_tests.benchmarks.networks import CHECKPOINTS, VisionTransformer

FIRST_SEED: Final = 1_000_000  # training draws its images with the seeds from here on


@dataclass(frozen=True)
class Recipe:
    """How to train one network: AdamW under a one-cycle schedule, on images drawn anew for each step.

    `bfloat16` is of the products; without hardware for it they take longer than in float32.
    """

    steps: int
    peak_rate: float
    decay: float
    batch: int = 128
    bfloat16: bool = True
    draw: Callable[[glyphs.Split, int, int], tuple[Tensor, Tensor]] = glyphs.load


RECIPES: Final = {
    "resnet20": Recipe(steps=1000, peak_rate=6e-3, decay=0.02),
    "mobilenet": Recipe(steps=1100, peak_rate=6e-3, decay=0.02),
    "vit": Recipe(steps=3300, peak_rate=3e-3, decay=0.05),
    "segmenter": Recipe(steps=500, peak_rate=6e-3, decay=0.02, batch=32, bfloat16=False, draw=scenes.load),
}
BUILDERS: Final[dict[str, Callable[[], nn.Module]]] = {**networks.BUILDERS, "segmenter": segmenter.Segmenter}


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of a network anew, from a local generator; those of convolutions become channels-last."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
        elif isinstance(module, VisionTransformer):
            nn.init.normal_(module.positions, std=0.02, generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def batches(recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield fresh training images (batch, 1, H, W) with their labels, one batch for each step."""
    for step in range(recipe.steps):
        yield recipe.draw("train", recipe.batch, FIRST_SEED + step)


def train(name: str) -> nn.Module:
    """Train one of the networks from scratch; return it in eval mode."""
    recipe = RECIPES[name]
    network = BUILDERS[name]()
    initialise(network, torch.Generator().manual_seed(0))
    network.train()
    decayed = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.peak_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.peak_rate, total_steps=recipe.steps, pct_start=0.15, cycle_momentum=False
    )
    progress = tqdm(batches(recipe), desc=name, total=recipe.steps, mininterval=1.0)
    for images, labels in progress:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
            logits: Tensor = network(images.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (n, 1, H, W) whose largest logit is at the label (n,)."""
    pairs = zip(torch.split(images, 500), torch.split(labels, 500), strict=True)
    hits = sum(int((network(part).argmax(1) == truth).sum()) for part, truth in pairs)
    return hits / len(labels)


def save(name: str, network: nn.Module) -> None:
    """Write the checkpoint of a network."""
    CHECKPOINTS.mkdir(exist_ok=True)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(state, CHECKPOINTS / f"{name}.safetensors")


def main() -> None:
    """Train the networks named on the command line, and print their accuracy as reloaded."""
    parser = argparse.ArgumentParser(description="Train the glyph networks and write their checkpoints.")
    parser.add_argument("names", nargs="+", choices=sorted(BUILDERS), metavar="NAME", help=", ".join(BUILDERS))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, 1 unless told otherwise")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names:
        start = time.perf_counter()
        save(name, train(name))
        seconds = time.perf_counter() - start
        if name == "segmenter":
            network: nn.Module = segmenter.load()
            score = f"test mean IoU {scenes.mean_iou(network, *scenes.load('test', 1000)):.2f} %"
        else:
            network = networks.load(name)
            score = f"test top-1 {accuracy(network, *glyphs.load('test', 10_000)):.2%}"
        size = sum(parameter.numel() for parameter in network.parameters())
        print(f"{name}: {size:,} parameters, {score}, trained in {seconds:.0f} s")


if __name__ == "__main__":
    main()
