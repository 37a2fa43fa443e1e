"""A pass over a network: both streams advanced stage by stage over all batches, and what was decided on the way."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.kept_values import BatchValues, KeptValues
from adaround_plugin.graph.memory import Memory
from adaround_plugin.graph.streams import BothValues, tensors
from adaround_plugin.graph.transforms import origin
from adaround_plugin.hosts.base import Host, WeightedNode, open_streams
from adaround_plugin.learning.activation_ranges import RangeTally
from adaround_plugin.learning.checkpoint import Checkpoint
from adaround_plugin.learning.output_error import OutputError, OutputTally
from adaround_plugin.learning.report_builder import ReportBuilder
from adaround_plugin.learning.shared import Shared
from adaround_plugin.regions.batches import Batches
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.forward import Place
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["Pass", "Plan", "Snapshot"]

# the nodes of the float and of the quantized stream that run next
Plan = tuple[list[fx.Node], list[fx.Node]]


@dataclass(frozen=True)
class Snapshot:
    """How far the quantized stream had got, and what both streams knew of each batch."""

    values: BatchValues
    done: frozenset[fx.Node]


class Pass:
    """One pass over a network: where both streams are, and the roundings so far.

    Args:
        host: of the network.
        arguments: of each batch, as the host's graphs take them.
        sampling: which columns are used, and which samples are held out.
        memory: keeps what the streams know of the batches; None for one without limit.
        excluded: names of the weighted nodes that stay nearest.
        seed: of all that is drawn.
        report: takes what is to be reported.
        shared: of a trial, whose layers are not compared with nearest: what it has in common with others.
        beside: a trial on the same batches that makes every step before this one does; its float stream is shared.
        checkpoint: keeps what is decided; None keeps nothing.

    Attributes:
        streams: the float and the quantized stream.
        values: what they know of each batch.
        memory: where that is kept.
        roundings: by name of the weighted node; round-to-nearest until it is decided.
        scales: what was learned for activations, by name of the observer.
        ranges: how far the values of the float stream lie outside of what observers saw.
        seconds: by phase; `layer_seconds` by weighted node.
    """

    def __init__(
        self,
        host: Host,
        arguments: Sequence[list[Any]],
        sampling: Sampling,
        *,
        memory: Memory | None = None,
        excluded: frozenset[str] = frozenset(),
        seed: int = 0,
        report: ReportBuilder,
        shared: Shared | None = None,
        beside: Pass | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.checkpoint = checkpoint or Checkpoint()
        self.host, self.sampling, self.excluded, self.seed = host, sampling, excluded, seed
        self.report, self.shared = report, shared
        self.streams = open_streams(host)
        batches = arguments if isinstance(arguments, Batches) else Batches.lent(arguments)
        given = [batches.kept(batch) for batch in range(len(batches))]
        exact = [KeptValues(self.streams[0].bind(of_batch)) for of_batch in given]
        if beside is not None:
            self.streams = beside.streams[0], self.streams[1]
            exact = beside.values.exact()
        for stream in self.streams:
            stream.keep(ends_of(stream))
        self.memory = memory or Memory()
        quantized = [KeptValues(self.streams[1].bind(of_batch)) for of_batch in given]
        self.values: BatchValues = BatchValues(self.memory, zip(exact, quantized, strict=True))
        self.roundings: dict[str, LayerRounding] = {}
        for node in host.nodes:
            self.set_rounding(node, node.nearest)
        devices = {node.weight.device for node in host.nodes}
        self._accelerators = [device for device in devices if device.type == "cuda"]
        self.ranges = RangeTally([] if self.is_trial else host.observed, self.streams[0].placeholders)
        self.scales: dict[str, float] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.layer_seconds: dict[str, float] = defaultdict(float)

    @property
    def is_trial(self) -> bool:
        """Whether this only tells what a recipe leads to."""
        return self.shared is not None

    @property
    def nodes(self) -> list[WeightedNode]:
        """The weighted nodes that are to be learned, in graph order."""
        return [node for node in self.host.nodes if node.name not in self.excluded]

    def set_rounding(self, node: WeightedNode, rounding: LayerRounding) -> LayerRounding:
        """Let the quantized stream go on with this rounding, as it is stored."""
        stored = node.stored(rounding)
        self.keep_rounding(node, stored)
        return stored

    def keep_rounding(self, node: WeightedNode, rounding: LayerRounding) -> None:
        """Let the quantized stream go on with a rounding that is as it is stored."""
        self.roundings[node.name] = rounding
        node.set_quantized(self.streams[1].module, rounding)

    def relearn(self, node: WeightedNode, rounding: LayerRounding) -> None:
        """Replace a layer's rounding by one learned on samples, and tell the report."""
        before = self.roundings[node.name]
        self.report.relearned(node, before, self.set_rounding(node, rounding))

    def take_back(self, node: WeightedNode) -> None:
        """Let a layer be nearest, as the network's output is better with that, and tell the report."""
        before = self.roundings[node.name]
        nearest = self.set_rounding(node, node.nearest)
        self.report.relearned(node, before, nearest, "nearest: with it the network's output is better")

    def take_back_scales(self) -> None:
        """Let the scales of activations be as observed, and tell the report."""
        self.scales.clear()
        if self.report.finetuning is not None:
            note = "; ".join([self.report.finetuning.note, "taken back: the network's output is better without"])
            self.report.finetuning = replace(self.report.finetuning, note=note)

    def forget_values(self) -> None:
        """Free what both streams know of the batches, when all is decided."""
        self.values = BatchValues(self.memory, [])

    def plan(self, pending: list[WeightedNode]) -> Plan:
        """The nodes of both streams that depend on no pending weight."""
        sites = [site for node in pending for site in node.sites]
        return (
            self.streams[0].runnable({site.float_node for site in sites}),
            self.streams[1].runnable({site.quantized_node for site in sites}),
        )

    def reaches(self, node: WeightedNode, plan: Plan) -> bool:
        """Whether the inputs of a weighted node are known at all of its call sites once a plan has run."""
        exact, quantized = self.streams
        return all(
            exact.reaches(site.float_node, plan[0]) and quantized.reaches(site.quantized_node, plan[1])
            for site in node.sites
        )

    def forward(self, plan: Plan, visit: Callable[[int, BothValues], None] | None = None) -> None:
        """Run the planned nodes for every batch, visit it, and free what no later node needs."""
        is_first = self.streams[1].done == set(self.streams[1].placeholders)
        reads = [stream.sources(nodes) for stream, nodes in zip(self.streams, plan, strict=True)]
        needed = tuple(stream.finish(nodes) for stream, nodes in zip(self.streams, plan, strict=True))
        watched = self.ranges.due(plan[0])
        for batch, values in self.values.visit(*reads):
            self._run(plan, values)
            self.ranges.look(watched, values[0])
            if is_first:
                self._share(plan, values)
            if visit is not None:
                visit(batch, values)
            for of_batch, keep in zip(values, needed, strict=True):
                for dead in of_batch.keys() - keep:
                    del of_batch[dead]
        self.memory.settle()
        self.values.read_ahead(*needed)

    @staticmethod
    def _share(plan: Plan, values: tuple[KeptValues, KeptValues]) -> None:
        """Keep once what both streams have in common before anything is quantized."""
        exact, quantized = values
        counterpart = {origin(node): node for node in plan[0] if node in exact}
        for node in plan[1]:
            source = counterpart.get(origin(node))
            if source is not None and _are_same(exact[source], quantized[node]):
                quantized.share(node, exact, source)

    def look_ahead(self, visit: Callable[[int, BothValues], None]) -> None:
        """Visit every batch with all nodes run, weights rounded as they are now; what runs here is run again later."""
        plan = self.plan([])
        for batch, values in enumerate(self.values):
            self._run(plan, values)
            visit(batch, values)

    def _run(self, plan: Plan, values: BothValues) -> None:
        with self.clock("forward"):
            for stream, nodes, of_batch in zip(self.streams, plan, values, strict=True):
                stream.run_nodes(of_batch, nodes)

    def snapshot(self) -> Snapshot:
        """What is needed to come back to here, and to learn from here; it keeps all values alive."""
        return Snapshot(self.values.copy(), frozenset(self.streams[1].done))

    def rewind(self, snapshot: Snapshot) -> None:
        """Let the quantized stream run again from there, on the roundings of now."""
        self.values = self.values.with_quantized_of(snapshot.values)
        self.streams[1].done = set(snapshot.done)

    def place(self, snapshot: Snapshot | None = None) -> Place:
        """How far the pass has got now, or had got at a snapshot."""
        values = self.values if snapshot is None else snapshot.values
        return Place(self.host, self.streams, values, self.roundings, self.sampling, self.memory)

    def finish(self) -> OutputError:
        """Run to the end; the error of the network's ends (`ends_of`)."""
        tally = OutputTally(self.sampling)

        def compare(batch: int, values: BothValues) -> None:
            exact, quantized = (
                tensors([stream.value(end, of_batch) for end in ends_of(stream)])
                for stream, of_batch in zip(self.streams, values, strict=True)
            )
            tally.add(batch, exact, quantized)

        self.forward(self.plan([]), compare)
        return tally.finish()

    def _now(self) -> float:
        """The time, when a GPU has done all that it was given."""
        for device in self._accelerators:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    @contextmanager
    def clock(self, phase: str, node: WeightedNode | None = None) -> Iterator[None]:
        """Add the time spent inside to a phase, and to a layer."""
        start = self._now()
        yield
        seconds = self._now() - start
        self.seconds[phase] += seconds
        if node is not None:
            self.layer_seconds[node.name] += seconds


def _are_same(one: Any, other: Any) -> bool:
    """Whether two values are one tensor's worth, laid out alike."""
    return (
        type(one) is type(other) is torch.Tensor
        and one is not other
        and (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
        and not one.is_quantized
        and one.layout == other.layout == torch.strided
        and one.stride() == other.stride()
        and torch.equal(one, other)
    )
