"""What the tests of the Neural Compressor adapter share: networks, calibration data, and the run function of INC."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from integration_tests.models import RECIPE, images

__all__ = ["RECIPE", "Functional", "Layers", "Tokens", "calibrate", "data", "network", "run_afresh"]


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


class Functional(nn.Module):
    """Functional operators, whose packed weights torch keeps as script objects."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.matrix = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.conv2d(x, self.kernel, None, (1, 1), (0, 0), (1, 1), 1).relu(), self.matrix, None)


class Tokens(nn.Module):
    """Token ids and a mask to scores: a convolution, a head tied to the embedding, two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.embedding = nn.Embedding(24, 16)
            self.mix = nn.Conv1d(16, 16, 3, padding=1)
            self.up, self.twin = nn.Linear(16, 32), nn.Linear(16, 32)
            self.down = nn.Linear(32, 16, bias=False)
            self.head = nn.Linear(16, 24, bias=False)
        self.twin.weight, self.head.weight = self.up.weight, self.embedding.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None, **unused: Tensor) -> Tensor:
        x = self.embedding(ids)
        if mask is not None:
            x = x * mask[..., None]
        x = x + self.mix(x.mT).mT
        return self.head(self.down(torch.relu(self.up(x)) + torch.tanh(self.twin(x))))


class Layers(nn.Module):
    """Linear layers whose names contain one another, one without a bias, and one known by two names."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.fc1 = nn.Linear(48, 32, bias=False)
            self.fc10 = nn.Linear(32, 24)
            self.head = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc10(self.fc1(x).relu()).relu())


def run_afresh(code: str, folder: Path) -> str:
    """Run code that knows `torch` and `folder` in a fresh process; returns what it writes to its standard error."""
    head = "import sys, torch\ntorch.set_num_threads(1)\nfolder = sys.argv[1]\n"
    command = [sys.executable, "-c", head + code, str(folder)]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stderr
