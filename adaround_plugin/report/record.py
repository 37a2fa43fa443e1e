"""What was done to each layer, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BlockReport", "ClippedActivation", "LayerReport", "RecipeTrial", "Record"]


@dataclass(frozen=True)
class LayerReport:
    """One learned layer.

    Attributes:
        name, kind: qualified name; type of the operator. `tied` names share the weight.
        shape: of the weight.
        bits: bit width of the integer range.
        nearest_error, learned_error: squared error of the output on the learning samples, of round-to-nearest on the
            observer's scale and of the learned rounding: the float output against that with quantized weight and
            quantized input, over the variance of the float weight's output on the quantized input. Columns are
            weighed as the recipe says, so errors of different recipes cannot be compared.
        nearest_holdout, learned_holdout: the same on held-out samples, None without any.
        learned: whether the learned rounding was kept; else the layer is nearest, because `note` says.
        flipped: share of the weights whose integer is not the nearest on the layer's own grid, as it was when the
            integer was chosen.
        clipped: share of the weights that lie outside the layer's grid.
        bias: `"corrected"`, `"added"` or `"kept"`.
        columns: how many columns entered the moments.
        seconds: time spent on this layer's moments and its rounding.
        note: anything unusual.
        least_scale, median_scale, greatest_scale: of the layer's scales, one for each channel or group.
    """

    name: str
    kind: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    bits: int
    nearest_error: float
    learned_error: float
    nearest_holdout: float | None
    learned_holdout: float | None
    learned: bool
    flipped: float
    clipped: float
    bias: str
    columns: int
    seconds: float
    note: str = ""
    least_scale: float | None = None
    median_scale: float | None = None
    greatest_scale: float | None = None


@dataclass(frozen=True)
class BlockReport:
    """Layers whose roundings were learned together on samples, or one layer that was.

    Attributes:
        name, layers: of the block, and of its layers.
        start_error, learned_error: squared error of the block's output over the float output's variance on the learning
            samples, before and after; None where nothing was learned on samples.
        start_holdout, learned_holdout: the same on held-out samples, None without any.
        iterations: steps made.
        seconds: time taken.
        note: anything unusual.
    """

    name: str
    layers: tuple[str, ...]
    start_error: float | None = None
    learned_error: float | None = None
    start_holdout: float | None = None
    learned_holdout: float | None = None
    iterations: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class RecipeTrial:
    """A recipe that was tried on part of the data.

    Attributes:
        recipe: its settings.
        output_error: the error of the network's output that the trial predicts for the run; None if it could not be
            tried, or is no number.
        note: why it could not be tried.
        taken: whether it was used.
    """

    recipe: str
    output_error: float | None
    note: str = ""
    taken: bool = False


@dataclass(frozen=True)
class ClippedActivation:
    """An activation of which much in the batches lies outside of what its observer saw, and is clipped.

    Attributes:
        name: of the module, or of the operator and the module that it stands in.
        low, high: the least and the greatest value that the observer saw.
        least, greatest: value in the batches, of the entries that were looked at.
        share: of these that lies outside by more than a twentieth of the observed range.
    """

    name: str
    low: float
    high: float
    least: float
    greatest: float
    share: float


@dataclass(frozen=True)
class Record:
    """What `adaround` did, without the ways to show it.

    Attributes:
        method, solver, recipe: what was used: the method, the solver of each layer's problem, and what it imitates.
        layers: learned layers in the order in which they were solved.
        skipped: `(name, kind, reason)` of weighted nodes that were not learned.
        trials: recipes tried by `"auto"`.
        blocks: what was learned on samples. The errors of `layers` are then those before it, but with `Paper`.
        finetuning: the whole network, where its scales and biases were learned on samples in the end.
        output_error: mean squared error of the network's outputs on held-out samples (on all without any), over their
            variance: of each entry about its own mean over samples. Scores are judged instead of probabilities and
            decisions that are made of them, and several outputs count alike.
        nearest_output_error: the same with all layers rounded to nearest. Where that was less, layers were taken back.
        seconds: wall time by phase: `setup` (checks and the reference conversion), `importance` (of columns),
            `forward`, `moments`, `solve`, `reconstruct` (learning on samples), `finetune`, `compare` (with nearest,
            in the end), `trials`, `total`.
        settings: arguments of `adaround` by name, as Python writes them, that repeat what was done, without trials.
            Objects without a text of their own stand there as the name of their type.
        versions: of this package and of torch.
        recalled: how many decisions an interrupted run had made, which were recalled from a checkpoint.
        processes: how many took part, each with its own shard of the data.
        weights: a digest of the float weight that each layer was learned from, excluded layers among them.
        memory: bytes, by what they are of. `process`: the most that the process had in memory since it began, where the
            system tells; `cuda:0` and the like: the most that torch had there; `process before` and the like: the same
            when learning began. `kept`: the most that batches, and what both networks knew of them, took in memory,
            within `budget`; `spilled`: the most of it that was in files; `written`: all that was written to them.
        clipped: activations of which more than 1 % lies outside of what observers saw.
    """

    method: str
    solver: str
    recipe: str
    layers: list[LayerReport]
    skipped: list[tuple[str, str, str]]
    trials: list[RecipeTrial] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    finetuning: BlockReport | None = None
    output_error: float | None = None
    nearest_output_error: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    recalled: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    processes: int = 1
    clipped: list[ClippedActivation] = field(default_factory=list)

    @property
    def learned_on_samples(self) -> list[BlockReport]:
        """The blocks, and the whole network where it was finetuned."""
        return [*self.blocks, *([] if self.finetuning is None else [self.finetuning])]

    @property
    def warnings(self) -> list[str]:
        """What may have spoiled the result, and what to do about it."""
        if not self.clipped:
            return []
        worst = max(self.clipped, key=lambda one: one.share)
        return [
            f"values in the batches lie outside of what observers saw, and are clipped, in {len(self.clipped)} "
            f"activations, the first {self.clipped[0].name!r}, most in {worst.name!r} ({worst.share:.1%} of its values "
            f"outside of {worst.low:.3g} to {worst.high:.3g}). Calibrate with the batches that you learn from, or pass "
            "batches that were prepared as those for calibration were."
        ]
