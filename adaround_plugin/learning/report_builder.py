"""The report of a pass, built from what its steps tell, and shown as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from adaround_plugin.hosts.base import Skipped, WeightedNode
from adaround_plugin.learning.layer import Recipe
from adaround_plugin.learning.progress import Progress
from adaround_plugin.learning.settings import written_out
from adaround_plugin.process_memory import peak_memory
from adaround_plugin.report import BlockReport, ClippedActivation, LayerReport, RecipeTrial, Report
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["ReportBuilder"]


@dataclass
class _Layer:
    """What is known of a layer so far."""

    node: WeightedNode
    rounding: LayerRounding
    notes: list[str]
    columns: int
    seconds: float
    flipped: float
    clipped: float
    why_nearest: str = ""

    def report(self) -> LayerReport:
        """As it is now."""
        node, rounding = self.node, self.rounding
        notes = list(self.notes)
        if not rounding.learned and self.columns:
            judged_on = "learning" if rounding.learned_holdout is None else "held-out"
            notes.append(self.why_nearest or f"nearest kept: it is better on the {judged_on} samples")
        touched = "corrected" if node.bias == "present" else "added"
        return LayerReport(
            name=node.name,
            kind=node.kind,
            tied=node.names[1:],
            shape=tuple(node.weight.shape),
            bits=rounding.grid.bits,
            nearest_error=rounding.nearest_error,
            learned_error=rounding.learned_error,
            nearest_holdout=rounding.nearest_holdout,
            learned_holdout=rounding.learned_holdout,
            learned=rounding.learned,
            flipped=self.flipped,
            clipped=self.clipped,
            bias="kept" if rounding.bias_correction is None else touched,
            columns=self.columns,
            seconds=self.seconds,
            note="; ".join(notes),
            least_scale=float(rounding.grid.scale.min()),
            median_scale=float(rounding.grid.scale.median()),
            greatest_scale=float(rounding.grid.scale.max()),
        )


@dataclass
class ReportBuilder:
    """Keeps what the steps of a pass tell, and shows it as it comes.

    Attributes:
        progress: where it is shown.
        blocks: what was learned on samples.
        finetuning: of the whole network.
        trials: recipes that were tried, or could not be.
        clipped: activations of which much lies outside of what observers saw.
    """

    progress: Progress
    blocks: list[BlockReport] = field(default_factory=list)
    finetuning: BlockReport | None = None
    trials: list[RecipeTrial] = field(default_factory=list)
    clipped: list[ClippedActivation] = field(default_factory=list)
    _layers: dict[str, _Layer] = field(default_factory=dict)
    _memory_before: dict[str, int] = field(default_factory=peak_memory)

    def trial(self, recipe: Recipe, output_error: float | None, note: str = "") -> None:
        """A recipe was tried, or could not be."""
        self.trials.append(RecipeTrial(str(recipe), output_error, note))

    def layer(
        self, node: WeightedNode, rounding: LayerRounding, notes: Sequence[str], columns: int, seconds: float
    ) -> None:
        """A layer was decided.

        Args:
            node, rounding: the layer.
            notes: anything unusual.
            columns: how many entered its moments.
            seconds: that it took.
        """
        flipped, clipped = _flipped(node, rounding), _clipped(node, rounding)
        entry = _Layer(node, rounding, list(notes), columns, seconds, flipped, clipped)
        self._layers[node.name] = entry
        self.progress.layer(entry.report())

    def relearned(
        self, node: WeightedNode, before: LayerRounding, rounding: LayerRounding, why_nearest: str = ""
    ) -> None:
        """A layer's rounding, scale or bias was learned again, with others on samples.

        Args:
            node: the layer.
            before, rounding: what it had and has.
            why_nearest: the reason, if that is nearest.
        """
        if node.name not in self._layers:
            return
        entry = self._layers[node.name]
        entry.why_nearest = why_nearest
        # errors stay those that were measured when the layer was decided
        entry.rounding = replace(
            entry.rounding,
            grid=rounding.grid,
            integers=rounding.integers,
            bias_correction=rounding.bias_correction,
            learned=rounding.learned,
        )
        if why_nearest:
            entry.clipped = _clipped(node, rounding)
        if why_nearest or not torch.equal(rounding.integers, before.integers):
            entry.flipped = _flipped(node, rounding)

    def steps(self, name: str) -> Callable[[int, float], None]:
        """What shows the steps of learning on samples."""
        return lambda iteration, loss: self.progress.step(name, iteration, loss)

    def build(
        self,
        *,
        method: str,
        solver: str,
        recipe: str,
        skipped: Sequence[Skipped],
        output_error: float,
        nearest_output_error: float,
        seconds: dict[str, float],
        settings: Mapping[str, object],
        versions: dict[str, str],
        weights: dict[str, str],
        recalled: int,
        memory: dict[str, int],
        processes: int = 1,
    ) -> Report:
        """The report; arguments as in `Report`, but for the settings, which are the objects themselves."""
        return Report(
            method=method,
            solver=solver,
            recipe=recipe,
            layers=[entry.report() for entry in self._layers.values()],
            skipped=[(entry.name, entry.kind, entry.reason) for entry in skipped],
            trials=[replace(trial, taken=trial.recipe == recipe) for trial in self.trials],
            blocks=self.blocks,
            finetuning=self.finetuning,
            output_error=output_error,
            nearest_output_error=nearest_output_error,
            seconds=seconds,
            settings=written_out(settings),
            versions=versions,
            weights=weights,
            recalled=recalled,
            memory=peak_memory() | {f"{name} before": used for name, used in self._memory_before.items()} | memory,
            processes=processes,
            clipped=self.clipped,
        )


def _flipped(node: WeightedNode, rounding: LayerRounding) -> float:
    """Share of the weights whose integer is not the nearest on the grid."""
    total = max(1, rounding.integers.numel())
    return float((rounding.integers != rounding.grid.nearest(node.weight)).sum()) / total


def _clipped(node: WeightedNode, rounding: LayerRounding) -> float:
    """Share of the weights that lie outside the grid by more than half a step."""
    grid = rounding.grid
    real = grid.coordinates(node.weight)
    total = max(1, rounding.integers.numel())
    return float(((real < grid.quant_min - 0.5) | (real > grid.quant_max + 0.5)).sum()) / total
