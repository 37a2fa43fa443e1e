"""Which cell stands where in the paper's tables, whether ours point in the paper's direction, and how it is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean, stdev, variance
from typing import Final, Literal

from integration_tests.benchmarks.paper_cells import Cell
from integration_tests.benchmarks.paper_figures import TABLES, Claim, Spot, Table

__all__ = ["LAYOUT", "Direction", "Place", "cells", "compare", "direct", "render", "summarize"]

Scores = Callable[[Cell], Sequence[float]]


@dataclass(frozen=True)
class Place:
    """What of ours stands at a place: the mean over a cell's seeds, or the best of them."""

    cell: Cell
    best: bool = False


def _rows(column: str, rows: Mapping[str, Cell]) -> dict[Spot, Place]:
    return {Spot(row, column): Place(cell) for row, cell in rows.items()}


def _first_and_all(rows: Mapping[str, str]) -> dict[Spot, Place]:
    """Methods on the first layer alone and on all layers."""
    first = _rows("first layer", {row: Cell(method, first=True) for row, method in rows.items()})
    return first | _rows("all layers", {row: Cell(method) for row, method in rows.items()})


_RELAXED: Final = "continuous relaxation, eq. 21"
_APPROXIMATIONS = {"nearest": "nearest", "task loss H(w), eq. 13": "task loss", "local MSE, eq. 20": "local"}
_CHOICES = {
    "sigmoid, T annealed": "temperature",
    "sigmoid + f_reg": "sigmoid",
    "rectified sigmoid + f_reg": "layer-wise",
}
_OBJECTIVES = {"layer-wise": "layer-wise", "asymmetric": "asymmetric", "asymmetric + ReLU": "adaround"}
_SCALES: Final[dict[str, Literal["minmax", "mse", "output"]]] = {
    "min-max": "minmax",
    "MSE of the weights": "mse",
    "MSE of the output": "output",
}
_DRAWS = Cell("stochastic", first=True)


def _dfq(network: str) -> Cell:
    """Equalization and bias correction, as DFQ has them, the latter on images."""
    return Cell("bias correction", network, activations=True, equalized=True)


def _literature(column: str, network: str, equalized: bool) -> dict[Spot, Place]:
    """Table 7's rows; the paper equalizes MobileNetV2 before AdaRound, as DFQ does every network."""
    return _rows(
        column,
        {
            "full precision": Cell("float", network),
            "DFQ, W8A8": replace(_dfq(network), bits=8),
            "nearest, W4A32": Cell("nearest", network),
            "AdaRound, W4A32": Cell("adaround", network, equalized=equalized),
            "DFQ, W4A8": _dfq(network),
            "bias correction, W4A8": Cell("bias correction", network, activations=True),
            "AdaRound, W4A8": Cell("adaround", network, activations=True, equalized=equalized),
        },
    )


_ORIGINS: Final[dict[str, Literal["training", "similar", "other"]]] = {
    "training images": "training",
    "similar domain": "similar",
    "another domain": "other",
}
_APPROXIMATED = _first_and_all(_APPROXIMATIONS | {_RELAXED: "layer-wise"})
del _APPROXIMATED[Spot("task loss H(w), eq. 13", "all layers")]

LAYOUT: Final[dict[str, dict[Spot, Place]]] = {
    "1": _rows(
        "first layer", {method: Cell(method, first=True) for method in ("nearest", "ceil", "floor", "stochastic")}
    )
    | {Spot("stochastic (best)", "first layer"): Place(_DRAWS, best=True)},
    "2": _APPROXIMATED,
    "3": _first_and_all(_CHOICES),
    "4": _rows("accuracy", {row: Cell(method) for row, method in _OBJECTIVES.items()}),
    "5": _rows(
        "accuracy",
        {"nearest": Cell("nearest"), "straight-through": Cell("straight-through"), "AdaRound": Cell("adaround")},
    ),
    "6": {
        Spot(row, column): Place(Cell(method, scale=scale))
        for row, scale in _SCALES.items()
        for column, method in (("nearest", "nearest"), ("AdaRound", "adaround"))
    },
    "7": _literature("ResNet18", "resnet20", False)
    | _literature("MobileNetV2", "mobilenet", True)
    | _literature("ViT", "vit", False),
    "8": _rows(
        "accuracy",
        {"nearest": Cell("nearest"), "bias correction": Cell("bias correction"), "AdaRound": Cell("adaround")},
    ),
    "9": _rows(
        "mIoU",
        {
            "full precision": Cell("float", "segmenter"),
            "nearest, W4A8": Cell("nearest", "segmenter", activations=True),
            "DFQ, W8A8": replace(_dfq("segmenter"), bits=8),
            "DFQ, W4A8": _dfq("segmenter"),
            "AdaRound, W4A8": Cell("adaround", "segmenter", activations=True),
        },
    ),
    "figure 4": {
        Spot(row, f"{count} images"): Place(Cell("adaround", images=count, origin=origin))
        for row, origin in _ORIGINS.items()
        for count in (64, 256, 1024)
    }
    | {Spot("full precision", f"{count} images"): Place(Cell("float")) for count in (64, 256, 1024)},
}


def cells(table: str, per_channel: bool) -> list[Cell]:
    """The cells of a table, each once."""
    return list(dict.fromkeys(_with(place.cell, per_channel) for place in LAYOUT[table].values()))


def _with(cell: Cell, per_channel: bool) -> Cell:
    return cell if cell.method == "float" else replace(cell, per_channel=per_channel)


@dataclass(frozen=True)
class Direction:
    """How far one score is above another, in points.

    Attributes:
        difference: of the means.
        noise: two standard errors of it over the seeds, and at least what one test image is worth.
        verdict: whether the claim that it is above holds.
    """

    difference: float
    noise: float
    verdict: Literal["agrees", "disagrees", "within noise"]

    def __str__(self) -> str:
        return f"{self.difference:+.2f} ± {self.noise:.2f}, {self.verdict}"


def compare(better: Sequence[float], worse: Sequence[float], within: float | None, resolution: float) -> Direction:
    """Check on scores of several seeds that `better` beats `worse`, or is no more than `within` points below.

    Args:
        better, worse: scores by seed, one where they do not depend on it.
        within: None for "beats".
        resolution: what one test image is worth, in points.
    """
    difference = mean(better) - mean(worse)
    squares = sum(variance(scores) / len(scores) for scores in (better, worse) if len(scores) > 1)
    noise = max(2 * sqrt(squares), resolution)
    above = difference + (within or 0.0)
    if above > noise or (within is not None and above >= 0):
        verdict: Literal["agrees", "disagrees", "within noise"] = "agrees"
    else:
        verdict = "disagrees" if above < -noise else "within noise"
    return Direction(difference, noise, verdict)


def _ours(place: Place, scores: Scores, per_channel: bool) -> list[float]:
    found = list(scores(_with(place.cell, per_channel)))
    return [max(found)] if place.best and found else found


def _kinds(granularities: Sequence[bool]) -> list[str]:
    return ["ours, per channel" if per_channel else "ours, per tensor" for per_channel in granularities]


def direct(table: Table, claim: Claim, scores: Scores, per_channel: bool, resolution: float) -> Direction | None:
    """The direction of ours for a claim of the paper; None where ours has no such place, or it was not run."""
    layout = LAYOUT[table.name]
    if claim.better not in layout or claim.worse not in layout:
        return None
    better, worse = (_ours(layout[spot], scores, per_channel) for spot in (claim.better, claim.worse))
    return compare(better, worse, claim.within, resolution) if better and worse else None


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _paper(table: Table, spot: Spot) -> str:
    figure = table.figure(spot)
    if figure is None:
        return ""
    deviation = "" if figure.deviation is None else f" ± {figure.deviation:.2f}"
    return f"{figure.mean:.2f}{deviation}" + ("?" if figure.source == "unconfirmed" else "")


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def render(name: str, scores: Scores, granularities: Sequence[bool]) -> Iterator[str]:
    """A table as Markdown: for each of the paper's columns its figures, and ours for each granularity.

    Args:
        name: of the table.
        scores: gives the scores of a cell by seed, none where it was not run.
        granularities: for each column of ours, whether its scales are per channel.
    """
    table, layout = TABLES[name], LAYOUT[name]
    kinds = _kinds(granularities)
    head = [""]
    for column in table.columns:
        head.append(f"{column}: paper")
        if any(spot.column == column for spot in layout):
            head.extend(f"{column}: {kind}" for kind in kinds)
    yield _line(head)
    yield "|" + "---|" * len(head)
    for row in table.rows:
        entries = [row]
        for column in table.columns:
            spot = Spot(row, column)
            entries.append(_paper(table, spot))
            if any(other.column == column for other in layout):
                place = layout.get(spot)
                entries.extend("" if place is None else _spread(_ours(place, scores, kind)) for kind in granularities)
        yield _line(entries)


def summarize(
    names: Sequence[str], scores: Scores, granularities: Sequence[bool], resolution: Callable[[str], float]
) -> Iterator[str]:
    """The paper's claims as Markdown: by how many points in the paper, and what ours says of them.

    Args:
        names: of the tables.
        scores, granularities: as for `render`.
        resolution: from a table to what one test image is worth, in points.
    """
    kinds = _kinds(granularities)
    yield _line(["table", "the paper says", "paper", *kinds])
    yield "|" + "---|" * (3 + len(kinds))
    for name in names:
        table = TABLES[name]
        for claim in table.claims:
            better, worse = table.figure(claim.better), table.figure(claim.worse)
            theirs = "" if better is None or worse is None else f"{better.mean - worse.mean:+.2f}"
            found = [direct(table, claim, scores, kind, resolution(name)) for kind in granularities]
            yield _line([name, str(claim), theirs, *("" if one is None else str(one) for one in found)])
