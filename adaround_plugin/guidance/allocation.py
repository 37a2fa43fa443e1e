"""`suggest_bits(...)`: bits for each layer under a budget, in the forms that the hosts take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.guidance.analysis import Analysis
from adaround_plugin.guidance.knapsack import Option, choose
from adaround_plugin.guidance.record import LayerAnalysis, Width
from adaround_plugin.guidance.text import allocation_text
from adaround_plugin.names import depth, select
from adaround_plugin.options import check_choice, check_mapping, check_number
from adaround_plugin.report.markup import paragraph, table
from adaround_plugin.report.text import number

__all__ = ["BitAllocation", "suggest_bits"]

Kind = Literal["learned", "nearest"]


@dataclass(frozen=True)
class BitAllocation:
    """Bits for each layer.

    Attributes:
        analysis: what they were chosen from.
        bits: by name of the layer, in graph order.
        rounding: whose losses were added up, `"learned"` or `"nearest"`.

    Raises:
        InvalidOptionError: the names are not those of the layers, bits that were not analysed, or another `rounding`.
    """

    analysis: Analysis
    bits: Mapping[str, int]
    rounding: Kind = "learned"

    def __post_init__(self) -> None:
        _check_analysis(self.analysis)
        check_mapping("bits", self.bits)
        check_choice("rounding", self.rounding, get_args(Kind))
        if apart := self.bits.keys() ^ {layer.name for layer in self.analysis.layers}:
            problem = f"{sorted(map(str, apart))} are in one of the bits and the analysis alone"
            raise InvalidOptionError("bits", problem, "Pass bits for every layer of the analysis, by name.")
        for layer in self.analysis.layers:
            layer.at(self.bits[layer.name])

    @property
    def widths(self) -> list[Width]:
        """Each layer at its bits, in graph order."""
        return [layer.at(self.bits[layer.name]) for layer in self.analysis.layers]

    @property
    def bytes(self) -> int:
        """Of all weights packed at their bits, with their scales."""
        return sum(width.bytes for width in self.widths)

    @property
    def average_bits(self) -> float:
        """Bits of a weight on the mean, without scales."""
        layers = self.analysis.layers
        return sum(layer.weights * self.bits[layer.name] for layer in layers) / sum(layer.weights for layer in layers)

    @property
    def predicted_loss(self) -> float:
        """The expected losses of all layers alone, added up: relative squared error of the network's output."""
        return sum(_loss(width, self.rounding) for width in self.widths)

    @property
    def most_common(self) -> int:
        """The bits that most weights have; of equally many the most."""
        counted: Counter[int] = Counter()
        for layer in self.analysis.layers:
            counted[self.bits[layer.name]] += layer.weights
        return max(counted, key=lambda bits: (counted[bits], bits))

    @property
    def layer_bits(self) -> dict[str, int]:
        """By name, tied names too, parents first: `layer_bits` of `get_adaround_qconfig_mapping`."""
        layers = self.analysis.layers
        found = {name: self.bits[layer.name] for layer in layers for name in (layer.name, *layer.tied)}
        return {name: found[name] for name in sorted(found, key=depth)}

    @property
    def layers(self) -> dict[str, dict[str, int]]:
        """By name: `layers` of `AdaRoundQuantizer` and of `AdaRoundWeightOnlyQuantizer`."""
        return {name: {"weight_bits": bits} for name, bits in self.layer_bits.items()}

    def inc_config(self, **parameters: Any) -> dict[str, Any]:
        """What `AdaRoundConfig.from_dict` of Neural Compressor takes.

        Args:
            **parameters: others of `AdaRoundConfig`, for all layers.
        """
        local = {name: {**parameters, "bits": bits} for name, bits in self.layer_bits.items()}
        return {"global": {**parameters, "bits": self.most_common}, "local": local}

    @property
    def summary(self) -> str:
        """What it takes and costs, in a sentence."""
        return (
            f"{self.bytes} bytes, {self.average_bits:.2f} bits a weight; predicted loss {number(self.predicted_loss)} "
            f"({self.rounding})"
        )

    def __str__(self) -> str:
        return allocation_text(self.analysis, self.bits, self.rounding, self.summary)

    def _repr_html_(self) -> str:
        rows = [
            (layer.name, str(layer.weights), str(width.bits), str(width.bytes), number(_loss(width, self.rounding)))
            for layer, width in zip(self.analysis.layers, self.widths, strict=True)
        ]
        return table(("layer", "weights", "bits", "bytes", "loss"), rows) + paragraph(self.summary)


def suggest_bits(
    analysis: Analysis,
    *,
    size: float | None = None,
    average_bits: float | None = None,
    max_loss: float | None = None,
    fixed: Mapping[str, int] | None = None,
    rounding: Kind = "learned",
) -> BitAllocation:
    """Bits for each layer: the least sum of expected losses in a size, or the least size for a sum of losses.

    The choice is exact for the sums (`knapsack`). That losses add up is an assumption: layers that are quantized
    together make errors that may cancel, and learned ones make up for each other (docs/how-to/choose-bits.md).

    Args:
        analysis: from `analyze`; its widths are the choice that there is.
        size: most bytes of all weights with their scales.
        average_bits: most bits of a weight on the mean, scales not counted.
        max_loss: the largest sum of losses; the fewest bytes are looked for.
        fixed: bits of single layers, by name, name of a parent, or regular expression; a later entry overrides an
            earlier one.
        rounding: whose losses: `"learned"`, for `adaround`, or `"nearest"`.

    Raises:
        InvalidOptionError: not one budget of the three, one that nothing fits, a name that matches no layer, or bits
            that were not analysed.
    """
    _check_analysis(analysis)
    check_choice("rounding", rounding, get_args(Kind))
    budgets = {"size": size, "average_bits": average_bits, "max_loss": max_loss}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        told = " and ".join(given) or "nothing"
        raise InvalidOptionError("size, average_bits, max_loss", f"{told} is given", "Pass one of them.")
    ((name, budget),) = given.items()
    check_number(name, budget, above=0)
    choices = _choices(analysis, fixed)

    def lost(layer: LayerAnalysis, width: Width) -> float:
        return _loss(width, rounding)

    def stored(layer: LayerAnalysis, width: Width) -> float:
        return width.bytes

    def counted(layer: LayerAnalysis, width: Width) -> float:
        return layer.weights * width.bits

    cost = {"size": stored, "average_bits": counted, "max_loss": lost}[name]
    value = stored if name == "max_loss" else lost
    scale = sum(layer.weights for layer in analysis.layers) if name == "average_bits" else 1
    found = _least(analysis, choices, cost, value, budget * scale)
    if found is None:
        least = sum(min(cost(layer, one) for one in choices[layer.name]) for layer in analysis.layers) / scale
        raise InvalidOptionError(
            name,
            f"{budget!r} is not enough: the least that the widths allow is {least:.6g}",
            "Pass more, or more bits.",
        )
    return BitAllocation(analysis, found, rounding)


def _check_analysis(analysis: Analysis) -> None:
    if not isinstance(analysis, Analysis):
        raise InvalidOptionError("analysis", f"is a {type(analysis).__name__}", "Pass what analyze(...) returned.")


def _choices(analysis: Analysis, fixed: Mapping[str, int] | None) -> dict[str, list[Width]]:
    """The widths that each layer may have."""
    found = {layer.name: list(layer.widths) for layer in analysis.layers}
    if fixed is None:
        return found
    check_mapping("fixed", fixed)
    of_name = {name: layer for layer in analysis.layers for name in (layer.name, *layer.tied)}
    for pattern, bits in fixed.items():
        check_choice(f"fixed[{pattern!r}]", bits, analysis.bits)
        for name in select(pattern, of_name, f"fixed[{pattern!r}]"):
            found[of_name[name].name] = [of_name[name].at(bits)]
    return found


def _least(
    analysis: Analysis,
    choices: Mapping[str, list[Width]],
    cost: Callable[[LayerAnalysis, Width], float],
    value: Callable[[LayerAnalysis, Width], float],
    budget: float,
) -> dict[str, int] | None:
    """Bits by name, of the least value within a budget of costs; None where nothing fits."""
    items = [[Option(cost(layer, one), value(layer, one)) for one in choices[layer.name]] for layer in analysis.layers]
    found = choose(items, budget)
    if found is None:
        return None
    return {layer.name: choices[layer.name][number].bits for layer, number in zip(analysis.layers, found, strict=True)}


def _loss(width: Width, rounding: Kind) -> float:
    return width.nearest_loss if rounding == "nearest" else width.learned_loss
