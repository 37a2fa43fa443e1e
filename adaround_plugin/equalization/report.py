"""What `equalize` did, as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx.node import map_aggregate

from adaround_plugin.errors import InvalidModelError

__all__ = ["EqualizationReport", "EqualizedPair", "Spread", "difference", "get_equalization_report", "spread"]

KEY = "adaround_equalization"


@dataclass(frozen=True)
class Spread:
    """The smallest, the median and the largest range of the channels, those with nothing but zeros left out.

    A range of weights is their largest magnitude in a channel, batch norm folded; one of activations the magnitude that
    one in a thousand exceeds.
    """

    smallest: float
    median: float
    largest: float


@dataclass(frozen=True)
class EqualizedPair:
    """Two layers that were equalized.

    Attributes:
        first, second: qualified names.
        between: names of the operations between them.
        scales: the smallest and the largest by which a channel was divided.
        before, after: ranges of the first layer's weights by output channel, or of the activations if these were
            equalized, and of the second layer's weights by input channel.
        absorbed: channels of the first layer whose high bias was absorbed.
        note: why none was, if that was asked for.
    """

    first: str
    second: str
    between: tuple[str, ...]
    scales: tuple[float, float]
    before: tuple[Spread, Spread]
    after: tuple[Spread, Spread]
    absorbed: int = 0
    note: str = ""


@dataclass(frozen=True)
class EqualizationReport:
    """What `equalize` did.

    Attributes:
        pairs: in the order of the model.
        skipped: `(name, kind, reason)` of the layers whose outputs were not scaled.
        iterations: sweeps over all pairs.
        converged: whether the last sweep changed the scales by no more than the tolerance.
        difference: largest change of the output on the example inputs, relative to the output's largest magnitude.
    """

    pairs: list[EqualizedPair]
    skipped: list[tuple[str, str, str]]
    iterations: int
    converged: bool
    difference: float

    def to_json(self, indent: int | None = 2) -> str:
        """The whole report as JSON."""
        return json.dumps(asdict(self), indent=indent)

    def __str__(self) -> str:
        lines = [
            f"{pair.first} -> {pair.second}: largest over median range "
            f"{_ratios(pair.before)} before, {_ratios(pair.after)} after"
            for pair in self.pairs
        ]
        lines += [f"skipped {name} ({kind}): {reason}" for name, kind, reason in self.skipped]
        state = "converged" if self.converged else "not converged"
        lines.append(
            f"{len(self.pairs)} pairs in {self.iterations} sweeps, {state}; output changed by {self.difference:.2g}"
        )
        return "\n".join(lines)


def spread(ranges: Tensor) -> Spread:
    """Of `(channels,)` ranges; zeros if all are."""
    positive = ranges[ranges > 0]
    if not len(positive):
        return Spread(0.0, 0.0, 0.0)
    return Spread(float(positive.min()), float(positive.median()), float(positive.max()))


def difference(before: Any, after: Any) -> float:
    """The largest change of a model's output, relative to the largest magnitude in it."""
    pairs = [(x, y) for x, y in zip(_tensors(before), _tensors(after), strict=True) if x.numel()]
    largest = max((float(x.abs().max()) for x, _ in pairs), default=0.0)
    change = max((float((x - y).abs().max()) for x, y in pairs), default=0.0)
    return change / largest if largest else change


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output."""
    found: list[Tensor] = []

    def collect(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value)
        return value

    map_aggregate(output, collect)
    return found


def _ratios(spreads: tuple[Spread, Spread]) -> str:
    return " and ".join(f"{one.largest / one.median:.3g}" if one.median else "-" for one in spreads)


def get_equalization_report(model: nn.Module) -> EqualizationReport:
    """The report that `equalize` left in the model it returned.

    Raises:
        InvalidModelError: the model has none.
    """
    report = getattr(model, KEY, None)
    if not isinstance(report, EqualizationReport):
        raise InvalidModelError("model", "carries no report", "Pass the model that equalize(...) returned.")
    return report
