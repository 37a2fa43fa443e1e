"""The figures of docs/explanation/method.md: nearest is not best, what the moments are, and the output side.

Everything in them is computed: by the package's own moments, and by trying every rounding. They are drawn on white, so
that they read on a dark page too.

    python -m integration_tests.benchmarks.concepts docs/figures
"""

from __future__ import annotations

import argparse
import math
from itertools import product
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from adaround_plugin.rounding.moments import Moments

__all__ = ["draw", "moments_of", "roundings"]

# a row of two weights, on a grid of step 1, and its inputs: two that are nearly one
_WEIGHT = torch.tensor([0.45, 0.40], dtype=torch.float64)
_NEAREST, _BEST, _OTHER = "tab:orange", "tab:blue", "0.55"


def inputs(count: int = 400, seed: int = 0) -> Tensor:
    """`(n, 2)` columns of a layer's input, strongly correlated."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return 0.9 * shared + 0.35 * torch.randn(count, 2, generator=generator, dtype=torch.float64) + 0.6


def moments_of(x: Tensor) -> Moments:
    """The moments of columns that the quantized stream has just like the float stream."""
    moments = Moments(1, 1, x.shape[1], torch.device("cpu"))
    moments.add(x.float().unsqueeze(0), torch.zeros(1, len(x), 1))
    moments.finish()
    return moments


def roundings(hessian: Tensor) -> dict[tuple[int, int], float]:
    """The error `(w - w^) H (w - w^)^T` of every rounding to -1, 0, 1 or 2."""
    found = {}
    for first, second in product(range(-1, 3), repeat=2):
        difference = _WEIGHT - torch.tensor([first, second], dtype=torch.float64)
        found[first, second] = float(difference @ hessian @ difference)
    return found


def ellipse(matrix: Tensor, level: float) -> Tensor:
    """`(2, n)` points `p` with `p^T M p = level`."""
    values, vectors = torch.linalg.eigh(matrix)
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    points: Tensor = vectors @ ((level / values).sqrt().unsqueeze(1) * circle)
    return points


def _panel(figure: Figure, place: int, title: str) -> Axes:
    axes = figure.add_subplot(1, 2, place)
    axes.set_title(title, fontsize=10)
    axes.set_aspect("equal")
    axes.grid(alpha=0.25)
    return axes


def _draw_moments(figure: Figure, x: Tensor, moments: Moments) -> None:
    """Left the columns, right what is left of them."""
    mean, hessian = moments.mean[0], moments.hessian[0]
    for place, title in ((1, f"{len(x)} columns of a layer's input"), (2, "what is kept: 2 means, 3 second moments")):
        axes = _panel(figure, place, title)
        if place == 1:
            axes.plot(*x.T, ".", color=_OTHER, markersize=3)
        around = mean.unsqueeze(1) + ellipse(torch.linalg.inv(hessian), 4.0)
        axes.plot(*around, color=_BEST)
        axes.plot(*mean, "+", color=_BEST, markersize=12)
        axes.set(xlabel="first input", ylabel="second input", xlim=(-3, 4), ylim=(-3, 4))
    entries = (hessian[0, 0], hessian[0, 1], hessian[1, 1])
    axes.text(-2.7, 3.1, "H = [{:.2f} {:.2f}; {:.2f} {:.2f}]".format(*entries[:2], *entries[1:]), fontsize=9)
    axes.text(-2.7, 2.5, "mean = ({:.2f}, {:.2f})".format(*mean), fontsize=9)


def _draw_nearest(figure: Figure, hessian: Tensor) -> None:
    """The same row under unlike inputs: left as if they had nothing in common, right as they are."""
    alone = torch.diag(hessian.diagonal())
    for place, matrix, title in ((1, alone, "inputs without correlation"), (2, hessian, "the inputs of the layer")):
        errors = roundings(matrix)
        best, nearest = min(errors, key=errors.__getitem__), (0, 0)
        axes = _panel(figure, place, title)
        for error in sorted({errors[best], errors[nearest], 4 * errors[nearest]}):
            axes.plot(*(_WEIGHT.unsqueeze(1) + ellipse(matrix, error)), color=_OTHER, linewidth=0.8)
        axes.plot(*zip(*errors, strict=True), "o", color=_OTHER, markersize=4)
        axes.plot(*_WEIGHT, "x", color="black", label="float weights")
        axes.plot(*nearest, "s", color=_NEAREST, markersize=9, label="nearest")
        axes.plot(*best, "o", color=_BEST, markersize=6, label="best")
        said = f"error of nearest {errors[nearest]:.3f}, of the best {errors[best]:.3f}"
        axes.set(xlabel=f"first weight\n{said}", ylabel="second weight", xlim=(-1.5, 2.5), ylim=(-1.5, 2.5))
        axes.legend(fontsize=8, loc="upper right")


def _draw_outputs(figure: Figure) -> None:
    """Errors of two outputs: left they count alike, right as the network's own output takes them."""
    # the network's output is their sum, but for a little
    derivatives = torch.tensor([[1.0, 0.85], [0.85, 1.0]], dtype=torch.float64)
    # what two rows leave of an input, of each up or down
    errors = {(a, b): torch.tensor([a, b], dtype=torch.float64) for a in (-0.35, 0.65) for b in (-0.4, 0.6)}
    for place, matrix, title in (
        (1, torch.eye(2, dtype=torch.float64), "rows apart: outputs count alike"),
        (2, derivatives, "as the network's own output takes them"),
    ):
        costs = {at: float(error @ matrix @ error) for at, error in errors.items()}
        best, nearest = min(costs, key=costs.__getitem__), (-0.35, -0.4)
        axes = _panel(figure, place, title)
        for cost in costs.values():
            axes.plot(*ellipse(matrix, cost), color=_OTHER, linewidth=0.8)
        axes.plot(*zip(*costs, strict=True), "o", color=_OTHER, markersize=4)
        axes.plot(*nearest, "s", color=_NEAREST, markersize=9, label="both rows nearest")
        axes.plot(*best, "o", color=_BEST, markersize=6, label="best")
        said = f"cost of nearest {costs[nearest]:.3f}, of the best {costs[best]:.3f}"
        axes.set(xlabel=f"error of the first output\n{said}", ylabel="error of the second output")
        axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
        axes.legend(fontsize=8, loc="upper right")


def draw(folder: Path) -> list[Path]:
    """Draw all figures into a folder."""
    x = inputs()
    moments = moments_of(x)
    made = []
    for name in ("moments", "nearest", "outputs"):
        figure = Figure(figsize=(8, 4.4), layout="constrained", facecolor="white")
        if name == "moments":
            _draw_moments(figure, x, moments)
        elif name == "nearest":
            _draw_nearest(figure, moments.hessian[0])
        else:
            _draw_outputs(figure)
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=110)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for path in draw(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
