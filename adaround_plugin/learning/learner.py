"""One pass over a host's graph: streams forward, moments, rounding, layer after layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.errors import NonFiniteError
from adaround_plugin.regions.blocks import Block, layer_exits, output_exits
from adaround_plugin.hosts.base import CallSite, Host, WeightedNode
from adaround_plugin.regions.importance import column_importance
from adaround_plugin.regions.region import Exit, Region
from adaround_plugin.graph.streams import BothValues, tensors
from adaround_plugin.learning.layer import Layer, LayerRounding, Recipe
from adaround_plugin.rounding.moments import Moments
from adaround_plugin.rounding.problem import Solver
from adaround_plugin.regions.reconstruction import Start, reconstruct
from adaround_plugin.learning.finetuning import Refinement, refine
from adaround_plugin.report import BlockReport, LayerReport
from adaround_plugin.rounding.schemes import up_or_down
from adaround_plugin.solvers.relaxation import Relaxation

__all__ = ["Learner", "Settings"]

Plan = tuple[list[fx.Node], list[fx.Node]]

# the moments of layers that are ready together are gathered together, as many as fit in this many bytes
_MOMENT_BYTES = 2 * 2**30
# random projections of the network's output in an estimate of how much a column matters; there are many columns
_PROJECTIONS = 2
# what every column weighs beside its importance, relative to the mean of that: derivatives are local
_EVEN_WEIGHT = 0.3


@dataclass(frozen=True)
class Settings:
    """How layers are learned.

    Attributes:
        solver: of the rounding problem of each layer.
        relaxation: how roundings are learned on samples after that, None for not at all.
        refinement: how scales and biases of the whole network are learned in the end, None for not at all.
        blocks: what is learned together on samples; empty for layer by layer.
        recipe: what layers imitate.
        scale: `"auto"`, `"observer"` or `"search"`.
        up_or_down: restrict integers to floor and ceil.
        frozen: names of weighted nodes that stay nearest.
        judge: compare each layer with nearest on held-out samples, and report; off for trials.
    """

    solver: Solver
    recipe: Recipe
    scale: str
    up_or_down: bool
    frozen: frozenset[str]
    judge: bool = True
    relaxation: Relaxation | None = None
    refinement: Refinement | None = None
    blocks: tuple[Block, ...] = ()


class Learner:
    """One pass over a host's graph with one recipe.

    Attributes:
        roundings: what was decided, by name of the weighted node; round-to-nearest until then.
        reports: one per learned layer, by name, in the order solved.
        block_reports: one per block.
        scales: what was learned for activations, by name of the observer.
        refinement_report: of the whole network's refinement.
        output_error: of the network's output, relative to its variance.
        seconds: by phase; `layer_seconds` by weighted node.
    """

    def __init__(
        self,
        host: Host,
        bound: list[list[Any]],
        sampling: Sampling,
        settings: Settings,
        on_layer: Callable[[LayerReport], None] | None = None,
        on_step: Callable[[str, int, float], None] | None = None,
    ) -> None:
        self.host, self.sampling, self.settings = host, sampling, settings
        self.on_layer, self.on_step = on_layer, on_step
        self.streams = (host.float_stream, host.quantized_stream)
        self.values: list[BothValues] = [
            (host.float_stream.bind(arguments), host.quantized_stream.bind(arguments)) for arguments in bound
        ]
        self.roundings: dict[str, LayerRounding] = {}
        self.reports: dict[str, LayerReport] = {}
        self.block_reports: list[BlockReport] = []
        self.scales: dict[str, float] = {}
        self.refinement_report: BlockReport | None = None
        self.exits: dict[str, tuple[Exit, ...]] = {}
        if settings.relaxation is not None and not settings.blocks:
            self.exits = layer_exits(host, host.nodes, settings.relaxation.activation)
        # by call site, for each batch the importance of its columns
        self.importance: dict[fx.Node, list[Tensor]] = {}
        self.output_error = 0.0
        self.seconds: dict[str, float] = defaultdict(float)
        self.layer_seconds: dict[str, float] = defaultdict(float)

    def run(self) -> None:
        """Decide every layer, then compare the network's outputs."""
        for stream in self.streams:
            stream.restart()
        for node in self.host.nodes:
            self.roundings[node.name] = self._baseline(node)
            node.set_quantized(self.roundings[node.name])
        # kept only where the network runs from its inputs again
        entry = [(dict(exact), dict(quantized)) for exact, quantized in self.values if self.settings.refinement]
        if self.settings.recipe.column_weighting == "fisher":
            self._weigh_columns()
        pending = [node for node in self.host.nodes if node.name not in self.settings.frozen]
        for block in self.settings.blocks:
            pending = self._learn_block(block, pending)
        while pending:
            pending = self._stage(pending)
        if self.settings.refinement is not None:
            self.refinement_report = self._refine(self.settings.refinement, entry)
        self._finish()

    def _refine(self, refinement: Refinement, entry: list[BothValues]) -> BlockReport:
        """Learn scales and biases, and integers where that is asked for, by the network's output, from its inputs."""
        began = time.perf_counter()
        nodes = [node for node in self.host.nodes if node.name not in self.settings.frozen]
        with self._clock("refine"):
            region = Region(
                *(nodes, output_exits(self.streams), self.roundings, self.host.nodes, self.streams, entry),
                *(self.sampling, refinement, True, self.host.batch_size, self.host.quantizers),
            )
            if not region.exits:
                return BlockReport("network", (), note="it has no output from which could be learned")
            notes = _region_notes(region, nodes, self.settings.recipe)
            names = tuple(node.name for node in region.nodes)
            starts = [self._start(node, self._searches(node), from_weight=False) for node in region.nodes]
            moves = any(start.moves_scale or start.moves_bias or refinement.integers for start in starts)
            if not region.quantizers and not moves:
                return BlockReport("network", names, note="; ".join([*notes, "nothing that may move"]))
            found = refine(region, starts, len(region.quantizers), refinement, self._step("network"))
        notes.append(
            f"{sum(start.moves_scale for start in starts)} scales of weights, "
            f"{sum(start.moves_bias for start in starts)} biases, {len(region.quantizers)} step sizes of activations"
        )
        if found.unreached:
            notes.append(f"no derivative reaches {found.unreached} of these")
        if found.better:
            if refinement.integers:
                pairs = list(zip(starts, found.weights, strict=True))
                moved = sum(int((start.integers != learned.integers).sum()) for start, learned in pairs)
                notes.append(f"{moved} of {sum(start.integers.numel() for start in starts)} integers moved")
            for node, learned in zip(region.nodes, found.weights, strict=True):
                rounding = self.roundings[node.name]
                changed = replace(
                    rounding,
                    grid=learned.grid,
                    integers=learned.integers,
                    bias_correction=learned.correction,
                    learned=rounding.learned or not torch.equal(rounding.integers, learned.integers),
                )
                self._accept(node, changed)
            for quantizer, stretch in zip(region.quantizers, found.stretches, strict=True):
                # a number of float32, as the host's observers have it
                scale = float(torch.tensor(quantizer.scale * stretch, dtype=torch.float32))
                quantizer.set_scale(scale)
                self.scales |= dict.fromkeys(quantizer.names, scale)
            self.values = [(exact, again) for (exact, _), (_, again) in zip(self.values, entry, strict=True)]
            self.streams[1].restart()
        else:
            notes.append("start kept: what was learned is no better")
        return BlockReport(
            *("network", names, found.start_error, found.learned_error, found.start_holdout, found.learned_holdout),
            *(found.iterations, time.perf_counter() - began, "; ".join(notes)),
        )

    def _weigh_columns(self) -> None:
        """Find how much each column matters, relative to the mean of its group at all call sites of the weight."""
        with self._clock("importance"):
            found = [
                column_importance(self.streams[0], self.host.nodes, self.sampling, batch, values[0], _PROJECTIONS)
                for batch, values in enumerate(self.values)
            ]
            for node in self.host.nodes:
                sites = [site.float_node for site in node.sites]
                if not all(site in of_batch for of_batch in found for site in sites):
                    continue
                count = sum(of_batch[site].shape[1] for of_batch in found for site in sites)
                total = torch.stack([of_batch[site].sum(1) for of_batch in found for site in sites]).sum(0)
                if not torch.isfinite(total).all():
                    continue
                mean = (total / max(1, count)).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
                self.importance |= {site: [of_batch.pop(site).div_(mean) for of_batch in found] for site in sites}

    def _learn_block(self, block: Block, pending: list[WeightedNode]) -> list[WeightedNode]:
        """Decide a block's layers one by one, then all together from its entry; returns what is left."""
        nodes = [node for node in block.nodes if node.name not in self.settings.frozen]
        names = {node.name for node in nodes}
        if not nodes:
            return pending
        # as far as the blocks before it allow
        self._forward(self._plan(pending), lambda batch, values: None)
        entry = [(dict(exact), dict(quantized)) for exact, quantized in self.values] if block.exits else []
        done = set(self.streams[1].done)
        while any(node.name in names for node in pending):
            pending = self._stage(pending, names)
        if not block.exits:
            if block.note:
                layers = tuple(node.name for node in nodes)
                self.block_reports.append(BlockReport(block.name, layers, note=block.note))
            return pending
        changed, report = self._reconstruct(nodes, block, entry)
        self.block_reports.append(report)
        if changed:
            # the quantized stream runs again, from the block's entry, on the roundings learned
            self.values = [(exact, again) for (exact, _), (_, again) in zip(self.values, entry, strict=True)]
            self.streams[1].done = done
        return pending

    def _reconstruct(
        self, nodes: list[WeightedNode], block: Block, values: list[BothValues]
    ) -> tuple[bool, BlockReport]:
        """Learn roundings on samples from where they are; whether any changed, and how the block's error fell."""
        relaxation, recipe = self.settings.relaxation, self.settings.recipe
        assert relaxation is not None
        began = time.perf_counter()
        with self._clock("reconstruct", nodes[0] if len(nodes) == 1 else None):
            region = Region(
                *(nodes, block.exits, self.roundings, self.host.nodes, self.streams, values, self.sampling),
                *(relaxation, recipe.asymmetric, self.host.batch_size),
            )
            notes = _region_notes(region, nodes, recipe)
            if not region.nodes:
                return False, BlockReport(block.name, tuple(node.name for node in nodes), note="; ".join(notes))
            moves_scale = relaxation.learn_scale
            starts = [
                self._start(node, moves_scale and self._searches(node), relaxation.start is None)
                for node in region.nodes
            ]
            found = reconstruct(region, starts, relaxation, self._step(block.name))
        if found.better:
            for node, learned in zip(region.nodes, found.weights, strict=True):
                rounding = replace(
                    self.roundings[node.name],
                    grid=learned.grid,
                    integers=learned.integers,
                    bias_correction=learned.correction,
                    learned=True,
                )
                self._accept(node, rounding)
        else:
            notes.append("start kept: what was learned is no better")
        names = tuple(node.name for node in region.nodes)
        return found.better, BlockReport(
            *(block.name, names, found.start_error, found.learned_error, found.start_holdout, found.learned_holdout),
            *(found.iterations, time.perf_counter() - began, "; ".join(notes)),
        )

    def _searches(self, node: WeightedNode) -> bool:
        """Whether the scale of a weight is ours to choose."""
        scale = self.settings.scale
        return scale == "search" or (scale == "auto" and not node.keeps_scale)

    def _start(self, node: WeightedNode, moves_scale: bool, from_weight: bool) -> Start:
        """Where learning of a weight on samples begins."""
        rounding = self.roundings[node.name]
        grid, bounded = rounding.grid, self.settings.up_or_down
        lowest, highest = (
            up_or_down(grid, node.weight)
            if bounded
            else (torch.full_like(rounding.integers, end) for end in (grid.quant_min, grid.quant_max))
        )
        moves_bias = self.settings.recipe.correct_bias and node.bias != "fixed"
        outputs = node.op.rows(node.weight).shape[:2].numel()
        return Start(
            *(node.weight, grid, rounding.integers, lowest, highest, outputs, rounding.bias_correction),
            *(moves_bias, moves_scale and not bounded, from_weight),
        )

    def _accept(self, node: WeightedNode, rounding: LayerRounding) -> None:
        """Take a rounding that was learned on samples in place of the one before."""
        before = self.roundings[node.name]
        self.roundings[node.name] = rounding
        node.set_quantized(rounding)
        if node.name in self.reports:
            self.reports[node.name] = _learned_again(self.reports[node.name], node, before, rounding)

    def _step(self, name: str) -> Callable[[int, float], None] | None:
        on_step = self.on_step
        return None if on_step is None else lambda iterations, loss: on_step(name, iterations, loss)

    def _baseline(self, node: WeightedNode) -> LayerRounding:
        return LayerRounding(node.grid, node.grid.nearest(node.weight), None, False, 0.0, 0.0, None, None)

    def _stage(self, pending: list[WeightedNode], names: Collection[str] = ()) -> list[WeightedNode]:
        """Advance both streams to the next weighted nodes and decide these; returns what is left.

        Of the nodes reached those of `names` come first, the others when none of these is.
        """
        plan = self._plan(pending)
        reached = [node for node in pending if all(self._reached(site, plan) for site in node.sites)]
        if not reached:
            # a weight that feeds itself through another call site: look ahead with roundings as they are
            first = next((node for node in pending if node.name in names), pending[0])
            self._decide(first, *self._look_ahead(first))
            return [node for node in pending if node is not first]
        ready = _fitting([node for node in reached if node.name in names] or reached)
        gathered = {node.name: _no_moments(node) for node in ready}

        def gather(batch: int, values: BothValues) -> None:
            for node in ready:
                self._gather(node, batch, values, *gathered[node.name])

        self._forward(plan, gather)
        for node in ready:
            self._decide(node, *gathered.pop(node.name))
        decided = {node.name for node in ready}
        return [node for node in pending if node.name not in decided]

    def _plan(self, pending: list[WeightedNode]) -> Plan:
        """The nodes of both streams that depend on no pending weight."""
        sites = [site for node in pending for site in node.sites]
        return (
            self.streams[0].runnable({site.float_node for site in sites}),
            self.streams[1].runnable({site.quantized_node for site in sites}),
        )

    def _reached(self, site: CallSite, plan: Plan) -> bool:
        return self.streams[0].reaches(site.float_node, plan[0]) and self.streams[1].reaches(
            site.quantized_node, plan[1]
        )

    def _forward(self, plan: Plan, visit: Callable[[int, BothValues], None]) -> None:
        """Run the planned nodes for every batch, visit it, and free what no later node needs."""
        needed = tuple(stream.finish(nodes) for stream, nodes in zip(self.streams, plan, strict=True))
        for batch, values in enumerate(self.values):
            self._run(plan, values)
            visit(batch, values)
            for of_batch, keep in zip(values, needed, strict=True):
                for dead in of_batch.keys() - keep:
                    del of_batch[dead]

    def _run(self, plan: Plan, values: BothValues) -> None:
        with self._clock("forward"):
            for stream, nodes, of_batch in zip(self.streams, plan, values, strict=True):
                stream.run_nodes(of_batch, nodes)

    def _look_ahead(self, node: WeightedNode) -> tuple[Moments, Moments]:
        """Moments of a weight over call sites that depend on one another; what runs here is run again later."""
        moments = _no_moments(node)
        plan = self._plan([])
        for batch, (exact, quantized) in enumerate(self.values):
            values = dict(exact), dict(quantized)
            self._run(plan, values)
            self._gather(node, batch, values, *moments)
        return moments

    def _gather(
        self,
        node: WeightedNode,
        batch: int,
        values: BothValues,
        moments: Moments,
        holdout: Moments,
    ) -> None:
        """Add one batch's columns at every call site."""
        with self._clock("moments", node):
            for site in node.sites:
                self._gather_site(node, site, batch, values, moments, holdout)

    def _gather_site(
        self,
        node: WeightedNode,
        site: CallSite,
        batch: int,
        values: BothValues,
        moments: Moments,
        holdout: Moments,
    ) -> None:
        x_float = self.streams[0].value(_input(site.float_node), values[0])
        x_quantized = self.streams[1].value(_input(site.quantized_node), values[1])
        shape = node.weight.shape
        node.check_input(x_float, batch)
        patches = node.op.patches(x_quantized.float(), shape)
        index, position = self.sampling.columns(batch, patches, len(node.sites))
        quantized = patches.columns(index, position)
        exact = node.op.patches(x_float, shape).columns(index, position)
        rows = node.op.rows(node.weight)
        deviation = (exact - quantized) @ rows.transpose(1, 2)
        important = self.importance.get(site.float_node)
        weight = (
            _column_weight(exact, index, patches.samples, self.settings.recipe)
            if important is None
            else important[batch] + _EVEN_WEIGHT
        )
        if not (torch.isfinite(deviation).all() and torch.isfinite(quantized.sum())):
            raise NonFiniteError(
                f"layer {node.name!r}", "its input holds NaN or infinity", "Check the model and the calibration data."
            )
        held = self.sampling.held_out(batch, patches.samples, index.device)[index]
        parts = ((moments, ~held), (holdout, held)) if self.settings.judge else ((moments, ~held),)
        for part, chosen in parts:
            if chosen.all():
                part.add(quantized, deviation, weight)
            else:
                part.add(quantized[:, chosen], deviation[:, chosen], weight[:, chosen])

    def _decide(self, node: WeightedNode, moments: Moments, holdout: Moments) -> None:
        """Learn one layer's rounding and put it into the quantized stream."""
        with self._clock("moments", node):
            layer = Layer(node.op, node.weight, node.grid, moments.finish(), holdout.finish())
        wanted = self.settings.recipe
        recipe = replace(wanted, correct_bias=wanted.correct_bias and node.bias != "fixed")
        search = self._searches(node)
        with self._clock("solve", node):
            rounding = (
                layer.learn(recipe, self.settings.solver, search, self.settings.up_or_down, self.settings.judge)
                if moments.count
                else layer.nearest()
            )
            node.set_quantized(rounding)
        self.roundings[node.name] = rounding
        weighed = all(self.importance.pop(site.float_node, None) is not None for site in node.sites)
        if not self.settings.judge:
            return
        notes = [] if moments.count else ["no learning sample reached it"]
        if node.name in self.exits and moments.count:
            block = Block(node.name, (node,), self.exits[node.name])
            changed, learned = self._reconstruct([node], block, self.values)
            if changed:
                decided = self.roundings[node.name]
                rounding = layer.rounded(decided.grid, decided.integers, decided.bias_correction)
            notes += [learned.note] if learned.note else []
            self.block_reports.append(learned)
        if wanted.column_weighting == "fisher" and not weighed:
            notes.append("columns weighed alike: no derivative by what it computes could be followed")
        if search and not layer.can_search_scale:
            notes.append("scale kept: it runs along the input channels")
        report = _layer_report(
            node, rounding, wanted, notes, moments.count + holdout.count, self.layer_seconds[node.name]
        )
        self.reports[node.name] = report
        if self.on_layer is not None:
            self.on_layer(report)

    def _finish(self) -> None:
        """Run to the end; relative error of the outputs on held-out samples, or on all if none is held out.

        Of an output without a leading axis of samples all counts.
        """
        error = power = 0.0

        def compare(batch: int, values: BothValues) -> None:
            nonlocal error, power
            outputs = [
                tensors(stream.value(stream.output_node.args[0], of_batch))
                for stream, of_batch in zip(self.streams, values, strict=True)
            ]
            for exact, quantized in zip(*outputs, strict=True):
                if self.sampling.every and exact.dim() and self.sampling.has_samples(batch, exact.shape[0]):
                    held = self.sampling.held_out(batch, exact.shape[0], exact.device)
                    exact, quantized = exact[held], quantized[held]
                error += float((exact - quantized).double().square().sum())
                power += float((exact.double() - exact.double().mean()).square().sum()) if exact.numel() else 0.0

        self._forward(self._plan([]), compare)
        self.output_error = error / power if power > 0 else error

    def _now(self) -> float:
        """The time, when a GPU has done all that it was given."""
        for device in {node.weight.device for node in self.host.nodes}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return time.perf_counter()

    @contextmanager
    def _clock(self, phase: str, node: WeightedNode | None = None) -> Iterator[None]:
        """Add the time spent inside to a phase, and to a layer."""
        start = self._now()
        yield
        seconds = self._now() - start
        self.seconds[phase] += seconds
        if node is not None:
            self.layer_seconds[node.name] += seconds


def _learned_again(
    report: LayerReport, node: WeightedNode, before: LayerRounding, rounding: LayerRounding
) -> LayerReport:
    """What a layer's report says after its rounding, scale or bias was learned again, with others on samples."""
    integers = rounding.integers
    flipped = report.flipped
    if not torch.equal(integers, before.integers):
        flipped = float((integers != rounding.grid.nearest(node.weight)).float().mean())
    notes = [note for note in report.note.split("; ") if note]
    if rounding.learned:
        notes = [note for note in notes if not note.startswith("nearest kept")]
    touched = "corrected" if node.bias == "present" else "added"
    return replace(
        report,
        learned=rounding.learned,
        flipped=flipped,
        bias="kept" if rounding.bias_correction is None else touched,
        note="; ".join(notes),
    )


def _region_notes(region: Region, nodes: list[WeightedNode], recipe: Recipe) -> list[str]:
    """What is unusual about a region."""
    left = [node.name for node in nodes if node not in region.nodes]
    why = "called elsewhere, with a computed bias, or only before what is no float"
    notes = [f"not learned on samples ({why}): {', '.join(left)}"] if left else []
    if not region.resampled:
        notes.append("minibatches are the caller's batches: samples cannot be told apart at its entry or exits")
    if not region.has_samples:
        notes.append("nothing held out: the leading axis at its exits is not one of samples")
    if region.is_unweighed:
        notes.append("entries weighed alike: no derivative by its output could be followed")
    if region.without_twin and not recipe.asymmetric:
        notes.append(f"quantized input taken for {', '.join(region.without_twin)}, which the float stream lacks")
    return notes


def _no_moments(node: WeightedNode) -> tuple[Moments, Moments]:
    """Empty moments for the learning and for the held-out samples."""
    groups, rows, columns = node.op.rows(node.weight).shape
    device = node.weight.device
    return Moments(groups, rows, columns, device), Moments(groups, rows, columns, device)


def _input(node: fx.Node) -> Any:
    """The activation input of a weighted node."""
    return node.args[0] if node.args else node.kwargs["input"]


def _fitting(ready: list[WeightedNode]) -> list[WeightedNode]:
    """As many of the ready nodes as have moments that fit in memory together; at least one."""
    taken: list[WeightedNode] = []
    used = 0
    for node in ready:
        groups, rows, columns = node.op.rows(node.weight).shape
        used += 2 * Moments.bytes(groups, rows, columns)
        if taken and used > _MOMENT_BYTES:
            break
        taken.append(node)
    return taken


def _column_weight(exact: Tensor, index: Tensor, length: int, recipe: Recipe) -> Tensor:
    """`(G, n)` weights: 1, or `1 / |x|^2` with the norm floored at a hundredth of the mean in the same sample."""
    if recipe.column_weighting != "inverse_norm":
        return torch.ones(exact.shape[:2], device=exact.device)
    power = exact.square().sum(2)
    total = power.new_zeros(power.shape[0], length).index_add_(1, index, power)
    count = torch.bincount(index, minlength=length).clamp_min(1)
    floor = 0.01 * (total / count)[:, index]
    return torch.where(floor > 0, 1 / (power + floor), 0.0)


def _layer_report(
    node: WeightedNode, rounding: LayerRounding, recipe: Recipe, notes: list[str], columns: int, seconds: float
) -> LayerReport:
    integers, grid = rounding.integers, rounding.grid
    real = grid.coordinates(node.weight)
    total = max(1, integers.numel())
    if not rounding.learned and columns:
        judged_on = "learning" if rounding.learned_holdout is None else "held-out"
        notes.append(f"nearest kept: it is better on the {judged_on} samples")
    if recipe.correct_bias and node.bias == "fixed":
        notes.append("no bias that could be corrected")
    touched = "corrected" if node.bias == "present" else "added"
    return LayerReport(
        name=node.name,
        kind=node.kind,
        tied=node.names[1:],
        shape=tuple(node.weight.shape),
        bits=grid.bits,
        nearest_error=rounding.nearest_error,
        learned_error=rounding.learned_error,
        nearest_holdout=rounding.nearest_holdout,
        learned_holdout=rounding.learned_holdout,
        learned=rounding.learned,
        flipped=float((integers != grid.nearest(node.weight)).sum()) / total,
        clipped=float(((real < grid.quant_min - 0.5) | (real > grid.quant_max + 0.5)).sum()) / total,
        bias="kept" if rounding.bias_correction is None else touched,
        columns=columns,
        seconds=seconds,
        note="; ".join(notes),
    )
