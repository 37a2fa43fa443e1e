"""What the AdaRound paper (Nagel et al., ICML 2020, arXiv 2004.10568) reports: its tables 1 to 9 and its figure 4.

Top-1 of ImageNet's validation set in percent (table 9: mean IoU of Pascal VOC), mean and standard deviation over five
seeds; weights of 4 bits with one scale per layer. Each figure says where it could be checked:

    text          a sentence of the paper's own text
    quoted        a public copy of the table (7), or a reproduction that prints the paper's figure beside its own
                  (table 1: bobondemon/stochastic_rounding_exp; tables 4 and 6, without deviations: Sparsebit's
                  pull request 117)
    unconfirmed   from memory: nothing was found to check it against
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, NamedTuple

__all__ = ["TABLES", "Claim", "Figure", "Spot", "Table"]


class Figure(NamedTuple):
    """A score of the paper, in percent, with its deviation where there is one."""

    mean: float
    deviation: float | None = None
    source: Literal["text", "quoted", "unconfirmed"] = "quoted"


class Spot(NamedTuple):
    """A place in a table."""

    row: str
    column: str


@dataclass(frozen=True)
class Claim:
    """`better` beats `worse`; with `within`, it is no more than so many points below."""

    better: Spot
    worse: Spot
    within: float | None = None

    def __str__(self) -> str:
        columns = {self.better.column, self.worse.column}
        names = [spot.row if len(columns) == 1 else f"{spot.row}, {spot.column}" for spot in (self.better, self.worse)]
        relation = "beats" if self.within is None else f"is within {self.within:g} points of"
        return f"{names[0]} {relation} {names[1]}" + (f" ({self.better.column})" if len(columns) == 1 else "")


@dataclass(frozen=True)
class Table:
    """One table: for each row the figures of its columns, and what the paper concludes from them."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[Figure | None, ...]]
    claims: tuple[Claim, ...]

    def figure(self, spot: Spot) -> Figure | None:
        """The paper's figure at a place; None where it has none."""
        return self.rows[spot.row][self.columns.index(spot.column)]


def _beats(column: str, *rows: str) -> tuple[Claim, ...]:
    """Each row beats the next."""
    return tuple(Claim(Spot(a, column), Spot(b, column)) for a, b in pairwise(rows))


def _memory(mean: float, deviation: float | None = None) -> Figure:
    return Figure(mean, deviation, "unconfirmed")


_FIRST, _ALL, _SCORE = "first layer", "all layers", "accuracy"
_FP, _NEAREST, _ADAROUND = "full precision", "nearest", "AdaRound"

_SCHEMES = Table(
    "1",
    "Rounding schemes, first layer of ResNet18",
    (_FIRST,),
    {
        _NEAREST: (Figure(52.29),),
        "ceil": (Figure(0.10),),
        "floor": (Figure(0.10),),
        "stochastic": (Figure(52.06, 5.52),),
        "stochastic (best)": (Figure(63.06),),
    },
    (
        *_beats(_FIRST, "stochastic (best)", _NEAREST, "ceil"),
        *_beats(_FIRST, _NEAREST, "floor"),
        *_beats(_FIRST, "stochastic", "ceil"),
    ),
)

_TASK, _LOCAL, _RELAXED = "task loss H(w), eq. 13", "local MSE, eq. 20", "continuous relaxation, eq. 21"
_APPROXIMATIONS = Table(
    "2",
    "From the task loss to the continuous relaxation, ResNet18",
    (_FIRST, _ALL),
    {
        _NEAREST: (Figure(52.29), Figure(23.99)),
        _TASK: (_memory(68.62, 0.16), None),
        _LOCAL: (_memory(69.39, 0.04), _memory(65.83, 0.14)),
        _RELAXED: (_memory(69.58, 0.03), Figure(66.56, 0.12)),
    },
    (
        *_beats(_FIRST, _TASK, _NEAREST),
        *_beats(_FIRST, _RELAXED, _LOCAL, _TASK),
        *_beats(_ALL, _RELAXED, _LOCAL, _NEAREST),
    ),
)

_ANNEALED, _SIGMOID, _RECTIFIED = "sigmoid, T annealed", "sigmoid + f_reg", "rectified sigmoid + f_reg"
_CHOICES = Table(
    "3",
    "Design choices of the relaxation, ResNet18",
    (_FIRST, _ALL),
    {
        _ANNEALED: (_memory(69.31, 0.21), _memory(65.22, 0.67)),
        _SIGMOID: (_memory(69.51, 0.06), _memory(66.25, 0.15)),
        _RECTIFIED: (_memory(69.58, 0.03), Figure(66.56, 0.12)),
    },
    (*_beats(_FIRST, _RECTIFIED, _SIGMOID, _ANNEALED), *_beats(_ALL, _RECTIFIED, _SIGMOID, _ANNEALED)),
)

_LAYER, _ASYMMETRIC, _RELU = "layer-wise", "asymmetric", "asymmetric + ReLU"
_OBJECTIVES = Table(
    "4",
    "Asymmetric reconstruction and the activation function in the objective, ResNet18",
    (_SCORE,),
    {_LAYER: (Figure(66.56, 0.12),), _ASYMMETRIC: (Figure(68.37, 0.07),), _RELU: (Figure(68.60, 0.09, "text"),)},
    _beats(_SCORE, _RELU, _ASYMMETRIC, _LAYER),
)

_STE = "straight-through"
_ESTIMATORS = Table(
    "5",
    "Straight-through estimator against AdaRound, ResNet18",
    (_SCORE,),
    {_NEAREST: (Figure(23.99),), _STE: (_memory(66.63, 0.06),), _ADAROUND: (Figure(68.60, 0.09, "text"),)},
    _beats(_SCORE, _ADAROUND, _STE, _NEAREST),
)

_MINMAX, _MSE, _OUTPUT = "min-max", "MSE of the weights", "MSE of the output"
_GRIDS = Table(
    "6",
    "Quantization grids, ResNet18",
    (_NEAREST, _ADAROUND),
    {
        _MINMAX: (Figure(0.23), Figure(61.96, 0.04)),
        _MSE: (Figure(23.99), Figure(68.60, 0.09, "text")),
        _OUTPUT: (_memory(42.89), _memory(68.62, 0.08)),
    },
    (
        *(Claim(Spot(grid, _ADAROUND), Spot(grid, _NEAREST)) for grid in (_MINMAX, _MSE, _OUTPUT)),
        *_beats(_NEAREST, _OUTPUT, _MSE, _MINMAX),
        *(Claim(Spot(grid, _ADAROUND), Spot(_MINMAX, _ADAROUND)) for grid in (_MSE, _OUTPUT)),
    ),
)

_WEIGHTS, _BOTH = ", W4A32", ", W4A8"
_NETS = ("ResNet18", "ResNet50", "InceptionV3", "MobileNetV2")
_DFQ, _BANNER = "DFQ" + _BOTH, "bias correction" + _BOTH
_LITERATURE = Table(
    "7",
    "Literature comparison",
    (*_NETS, "ViT"),
    {
        _FP: (Figure(69.68), Figure(76.07), Figure(77.40), Figure(71.72), None),
        "DFQ, W8A8": (Figure(69.7), None, None, Figure(71.2), None),
        _NEAREST + _WEIGHTS: (Figure(23.99), Figure(35.60), Figure(1.67), Figure(8.09), None),
        "OMSE + opt" + _WEIGHTS: (Figure(67.12), Figure(74.67), Figure(73.66), None, None),
        "OCS" + _WEIGHTS: (None, Figure(66.2), Figure(4.8), None, None),
        _ADAROUND + _WEIGHTS: (
            Figure(68.71, 0.06),
            Figure(75.23, 0.04),
            Figure(75.76, 0.09),
            Figure(69.78, 0.05),
            None,
        ),
        _DFQ: (Figure(38.98), Figure(52.84), None, Figure(46.57), None),
        _BANNER: (Figure(67.4), Figure(74.8), Figure(59.5), None, None),
        _ADAROUND + _BOTH: (Figure(68.55, 0.01), Figure(75.01, 0.05), Figure(75.72, 0.09), Figure(69.25, 0.06), None),
    },
    (
        *(claim for net in ("ResNet18", "MobileNetV2") for claim in _beats(net, _ADAROUND + _BOTH, _DFQ)),
        *_beats("ResNet18", _ADAROUND + _BOTH, _BANNER),
        *(
            claim
            for net in ("ResNet18", "MobileNetV2")
            for claim in _beats(net, _ADAROUND + _WEIGHTS, _NEAREST + _WEIGHTS)
        ),
        Claim(Spot(_ADAROUND + _WEIGHTS, "ResNet18"), Spot(_FP, "ResNet18"), within=1.0),
        Claim(Spot(_ADAROUND + _WEIGHTS, "MobileNetV2"), Spot(_FP, "MobileNetV2"), within=2.0),
        *(
            Claim(Spot(_ADAROUND + _BOTH, net), Spot(_ADAROUND + _WEIGHTS, net), within=0.6)
            for net in ("ResNet18", "MobileNetV2")
        ),
    ),
)

_BIAS = "bias correction"
_CORRECTION = Table(
    "8",
    "Bias correction against AdaRound, ResNet18",
    (_SCORE,),
    {_NEAREST: (Figure(23.99),), _BIAS: (Figure(38.87, None, "text"),), _ADAROUND: (Figure(68.60, 0.09, "text"),)},
    _beats(_SCORE, _ADAROUND, _BIAS, _NEAREST),
)

_MIOU = "mIoU"
_SEGMENTATION = Table(
    "9",
    "Semantic segmentation, DeepLabV3+ with MobileNetV2",
    (_MIOU,),
    {
        _FP: (_memory(72.94),),
        "DFQ, W8A8": (_memory(72.33),),
        _NEAREST + _BOTH: (_memory(6.09),),
        _DFQ: (_memory(14.45),),
        _ADAROUND + _BOTH: (_memory(70.86, 0.37),),
    },
    (
        *_beats(_MIOU, _ADAROUND + _BOTH, _DFQ, _NEAREST + _BOTH),
        # "DFQ works well for 8 bits"; "only a 2 % performance decrease" (section 5.2), 2.08 by the figures
        Claim(Spot("DFQ, W8A8", _MIOU), Spot(_FP, _MIOU), within=1.0),
        Claim(Spot(_ADAROUND + _BOTH, _MIOU), Spot(_FP, _MIOU), within=2.1),
    ),
)

# the figure is drawn, without numbers; its claims are those of section 5.1
_COUNTS = ("64 images", "256 images", "1024 images")
_OWN, _SIMILAR, _FARTHER = "training images", "similar domain", "another domain"
_CALIBRATION = Table(
    "figure 4",
    "Number and origin of the calibration images, AdaRound on ResNet18",
    _COUNTS,
    {_FP: (Figure(69.68, None, "text"),) * 3, _OWN: (None,) * 3, _SIMILAR: (None,) * 3, _FARTHER: (None,) * 3},
    (
        Claim(Spot(_OWN, "256 images"), Spot(_FP, "256 images"), within=2.0),
        *(Claim(Spot(_SIMILAR, count), Spot(_OWN, count), within=0.2) for count in _COUNTS),
    ),
)

TABLES: Final = {
    table.name: table
    for table in (
        *(_SCHEMES, _APPROXIMATIONS, _CHOICES, _OBJECTIVES, _ESTIMATORS, _GRIDS),
        *(_LITERATURE, _CORRECTION, _SEGMENTATION, _CALIBRATION),
    )
}
