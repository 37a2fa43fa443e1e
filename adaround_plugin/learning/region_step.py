"""Learn the roundings of a region on samples, starting from those decided, and keep them where they are better."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from adaround_plugin.hosts.base import ActivationQuantizer, WeightedNode
from adaround_plugin.learning.layerwise import LayerWise
from adaround_plugin.learning.passes import Pass, Snapshot
from adaround_plugin.regions.forward import Exit
from adaround_plugin.regions.learnable import LearnedWeight, Outcome, WeightInit
from adaround_plugin.regions.region import Drawing, Region
from adaround_plugin.report import BlockReport
from adaround_plugin.rounding.schemes import up_or_down

__all__ = ["RegionStep"]

# learns a region, given its weights' starts and a progress callback; returns None where nothing may move
Learn = Callable[[Region, list[WeightInit], Callable[[int, float], None]], Outcome | None]


@dataclass(frozen=True)
class _Decided:
    """What was learned of a region.

    Attributes:
        report: what is said of it.
        better: whether it is taken.
        weights: by name of the weighted node, where it is.
        factors: of the scales of activations, by name of the first observer, where it is.
    """

    report: BlockReport
    better: bool = False
    weights: dict[str, LearnedWeight] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RegionStep:
    """A region to be learned.

    Attributes:
        run: the pass.
        layers: the options by which its layers were decided; they say which scales, biases and integers may move.
        name: of the region, for the report.
        nodes, exits: its weights, and where its output is compared.
        drawing: how minibatches are drawn.
        phase: what its time counts for.
        learns_scale: whether scales of weights are learned, where they are ours.
        propagate_error: take the quantized stream's values at the entry, else the float stream's.
        quantizers: of activations whose scales are learned.
        start: where the region begins, if not where the pass is.
        decides: whether its layers count as learned when the outcome is taken, also where no integer moved.
    """

    run: Pass
    layers: LayerWise
    name: str
    nodes: Sequence[WeightedNode]
    exits: Sequence[Exit]
    drawing: Drawing
    phase: str
    learns_scale: bool
    propagate_error: bool
    quantizers: Sequence[ActivationQuantizer] = ()
    start: Snapshot | None = None
    decides: bool = True

    def learn(self, learn: Learn) -> BlockReport:
        """Learn the region, take the outcome into the pass where it is better, and tell what was done."""
        decided = self.run.checkpoint.decide(self.phase, self.name, _Decided, lambda: self._decide(learn))
        if decided.better:
            self._take(decided)
        return decided.report

    def _decide(self, learn: Learn) -> _Decided:
        """Learn the region."""
        run, began = self.run, time.perf_counter()
        with run.clock(self.phase, self.nodes[0] if len(self.nodes) == 1 else None):
            region = Region(
                run.place(self.start),
                self.nodes,
                self.exits,
                self.drawing,
                propagate_error=self.propagate_error,
                quantizers=self.quantizers,
            )
            notes = self._notes(region)
            names = tuple(node.name for node in region.nodes)
            found = None
            if region.nodes or region.quantizers:
                found = learn(region, [self._init(node) for node in region.nodes], run.report.steps(self.name))
        if found is None:
            notes += ["nothing may move"] if region.exits else []
            return _Decided(BlockReport(self.name, names, note="; ".join(notes)))
        notes += found.notes
        if not found.better:
            notes.append("start kept: what was learned is no better")
        report = BlockReport(
            name=self.name,
            layers=names,
            start_error=found.start_error,
            learned_error=found.learned_error,
            start_holdout=found.start_holdout,
            learned_holdout=found.learned_holdout,
            iterations=found.iterations,
            seconds=time.perf_counter() - began,
            note="; ".join(notes),
        )
        if not found.better:
            return _Decided(report)
        factors = zip(region.quantizers, found.scale_factors, strict=True)
        return _Decided(
            report,
            True,
            dict(zip(names, found.weights, strict=True)),
            {quantizer.names[0]: factor for quantizer, factor in factors},
        )

    def _take(self, decided: _Decided) -> None:
        """Take what was learned into the pass."""
        run, nodes = self.run, {node.name: node for node in self.nodes}
        for name, learned in decided.weights.items():
            before = run.roundings[name]
            moved = not torch.equal(before.integers, learned.integers)
            rounding = replace(
                before,
                grid=learned.grid,
                integers=learned.integers,
                bias_correction=learned.correction,
                learned=self.decides or before.learned or moved,
            )
            run.relearn(nodes[name], rounding)
        for quantizer in self.quantizers:
            if quantizer.names[0] not in decided.factors:
                continue
            # a number of float32, as the host's observers have it
            scale = float(
                torch.tensor(quantizer.scale * decided.factors[quantizer.names[0]], dtype=torch.float32, device="cpu")
            )
            quantizer.set_scale(run.streams[1], scale)
            run.scales |= dict.fromkeys(quantizer.names, scale)
        if self.start is not None:
            run.rewind(self.start)

    def _init(self, node: WeightedNode) -> WeightInit:
        """Where learning of a weight begins."""
        rounding = self.run.roundings[node.name]
        grid, bounded = rounding.grid, self.layers.levels == "up_or_down"
        if bounded:
            lowest, highest = up_or_down(grid, node.weight)
        else:
            lowest, highest = (torch.full_like(rounding.integers, end) for end in (grid.quant_min, grid.quant_max))
        return WeightInit(
            weight=node.weight,
            grid=grid,
            integers=rounding.integers,
            lowest=lowest,
            highest=highest,
            outputs=node.op.rows(node.weight).shape[:2].numel(),
            correction=rounding.bias_correction,
            moves_bias=self.layers.recipe.correct_bias and node.bias != "fixed",
            moves_scale=self.learns_scale and self.layers.searches_scale(node) and not bounded,
        )

    def _notes(self, region: Region) -> list[str]:
        """What is unusual about the region."""
        if not region.exits:
            return ["it has no output that could be learned from"]
        left = [node.name for node in self.nodes if node not in region.nodes]
        why = "used outside the block, has a computed bias, or feeds only integer values"
        notes = [f"not learned on samples ({why}): {', '.join(left)}"] if left else []
        if not region.resampled:
            notes.append("minibatches are your batches: a value at its inputs or outputs has no sample axis")
        if not region.has_samples:
            notes.append("nothing held out: the first axis of its outputs is not the sample axis")
        if region.is_unweighed:
            notes.append("entries weighed alike: the network's output has no finite derivative by the block's output")
        if region.without_counterpart and not self.propagate_error:
            lacking = ", ".join(region.without_counterpart)
            notes.append(f"{lacking} taken from the quantized network: the float network has no such value")
        return notes
