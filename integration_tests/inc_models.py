"""What the tests of the Neural Compressor adapter share: networks, calibration data, and the run function of INC."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from integration_tests.models import images

# one recipe: the trials of "auto" are tested elsewhere
RECIPE = {"asymmetric": True, "correct_bias": True, "column_weighting": "none", "damping": 0.01}


def network() -> nn.Sequential:
    """A convolution that fuses with its norm and ReLU, a transposed one, and two linear layers; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            nn.ConvTranspose2d(4, 4, 2),
            nn.Flatten(),
            nn.Linear(196, 6, bias=False),
            nn.ReLU(),
            nn.Linear(6, 5),
        ).eval()


def data() -> list[Tensor]:
    """Three batches of images for `network`."""
    return [images(8, 3, 8, 8, seed=seed) for seed in range(3)]


def calibrate(batches: list[Tensor]) -> Callable[[nn.Module], None]:
    """A `run_fn` as INC wants it."""

    def run(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    return run
