"""What an analysis found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from adaround_plugin.errors import InvalidOptionError

__all__ = ["LayerAnalysis", "Record", "Width"]


@dataclass(frozen=True)
class Width:
    """A layer at one bit width, all others in float.

    Attributes:
        bits: of the weights.
        bytes: of the weights packed at that width, with their scales, and with zero points where the grid is affine.
        nearest_loss, learned_loss: the error of the network's output that is expected with the weight rounded to
            nearest, and by GPTQ with its scale searched and rows that make up for each other: squared, over the
            variance of the output.
    """

    bits: int
    bytes: int
    nearest_loss: float
    learned_loss: float


@dataclass(frozen=True)
class LayerAnalysis:
    """A layer at all widths.

    Attributes:
        name, kind: qualified name; type of the operator. `tied` names share the weight.
        shape: of the weight.
        weights: how many it has.
        widths: in order of their bits.
    """

    name: str
    kind: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    weights: int
    widths: tuple[Width, ...]

    def at(self, bits: int) -> Width:
        """The layer at one of its widths.

        Raises:
            InvalidOptionError: it is none of them.
        """
        for width in self.widths:
            if width.bits == bits:
                return width
        known = [width.bits for width in self.widths]
        raise InvalidOptionError("bits", f"{bits!r} was not analysed for {self.name!r}", f"Pass one of {known}.")


@dataclass(frozen=True)
class Record:
    """What an analysis found, without the ways to show it.

    Attributes:
        layers: in graph order.
        skipped: `(name, kind, reason)` of weighted nodes of which nothing is known.
        bits: the widths, in order.
        samples: how many samples were seen.
        seconds: wall time by phase: `setup`, `forward` (second moments of inputs, and roundings), `derivatives`,
            `total`.
        versions: of this package and of torch.
    """

    layers: list[LayerAnalysis]
    skipped: list[tuple[str, str, str]]
    bits: tuple[int, ...]
    samples: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
