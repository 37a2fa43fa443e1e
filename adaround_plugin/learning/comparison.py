"""The network's output after learning beside that of round-to-nearest: what is worse there is taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isfinite
from typing import Any

import torch

from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.memory import Memory
from adaround_plugin.graph.streams import Stream, tensors
from adaround_plugin.graph.value_files import Kept
from adaround_plugin.hosts.base import Host, open_streams
from adaround_plugin.learning.output_error import OutputTally
from adaround_plugin.learning.passes import Pass
from adaround_plugin.regions.batches import Batches
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.pieces import stand_alone
from adaround_plugin.regions.spread import put_together, whole
from adaround_plugin.report import ClippedActivation
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["Comparison"]

# samples to compare on where whole batches are, as many as there are
_LEAST_SAMPLES = 128
# layers are taken back one by one, or, where there are more than this, in so many runs of neighbours
_RUNS = 16


@dataclass(frozen=True)
class _Decided:
    """What a comparison found.

    Attributes:
        error, nearest_error: of what is left, and of nearest.
        taken: the layers to be nearest again, those that do most harm first.
        takes_scales: whether the scales of activations are to be as observed again.
        clipped: what the pass has seen outside of what observers saw.
    """

    error: float
    nearest_error: float
    taken: list[str] = field(default_factory=list)
    takes_scales: bool = False
    clipped: list[ClippedActivation] = field(default_factory=list)


class Comparison:
    """Compares outputs on held-out samples, on all without any.

    Held-out samples are put together to batches of their own. Where that cannot be done, or where a network mixes its
    samples, they are judged among the others of their batches, of as many batches as have about 128 samples.

    Args:
        host: of the network.
        arguments: of each batch, as the host's graphs take them.
        sampling: which samples are held out.
        memory: where what is compared on is kept; None for one without limit.
    """

    def __init__(
        self, host: Host, arguments: Sequence[list[Any]], sampling: Sampling, memory: Memory | None = None
    ) -> None:
        self._host, self._mask, self._memory = host, sampling.mask, memory or Memory()
        self._exact, self._quantized = open_streams(host)
        largest = sampling.largest
        values, size = self._exact.bind(arguments[largest]), sampling.size[largest]
        alone = stand_alone(self._exact, values, size, fixed=host.batch_size is not None)
        batches, self._judged = _part(arguments, sampling, host.batch_size, alone)
        self._batches = Batches.of(batches, self._memory)
        # with the samples of other processes; all of them where no sample is held out
        self._processes = sampling.processes
        if self._processes.agree("what outputs are compared on", not bool(self._judged.any())):
            self._judged = torch.ones_like(self._judged)
        # the float network's outputs of each batch, once they are known
        self._answers: list[Kept] = []

    def error(
        self, roundings: Mapping[str, LayerRounding], scales: Mapping[str, float], variances: Sequence[float]
    ) -> float:
        """The error of the network's ends (`ends_of`), relative to their variances.

        Args:
            roundings: by name of the weighted node; others are nearest.
            scales: of activations, by name of the observer; others are as observed.
            variances: of the ends, over all samples.
        """
        stream = self._quantized
        for node in self._host.nodes:
            node.set_quantized(stream.module, roundings.get(node.name) or node.nearest)
        for quantizer in self._host.quantizers:
            quantizer.set_scale(stream, scales.get(quantizer.names[0], quantizer.scale))
        tally = OutputTally(Sampling.of(self._batches, 0, 1, 0, mask=self._mask), variances)
        for number, batch in enumerate(self._batches):
            if number == len(self._answers):
                self._answers += self._memory.keep([self._outputs(self._exact, batch)])
            tally.add(number, self._answers[number].value, self._outputs(stream, batch))
        judged = tally.finish().samples[self._judged]
        total, count = judged.sum(), judged.new_tensor(len(judged))
        self._processes.add("comparing outputs", total, count)
        found = float(total / count)
        return found if isfinite(found) else inf

    @staticmethod
    def _outputs(stream: Stream, batch: list[Any]) -> list[torch.Tensor]:
        return tensors(stream.outputs(batch, ends_of(stream)))

    def take_back(self, run: Pass) -> tuple[float, float]:
        """Let layers be nearest again until the output is not worse than with all of them nearest.

        Layers, or runs of neighbours where there are many, are tried alone; those that do most harm go first, and all
        with the scales of activations if that is not enough.

        Args:
            run: the pass that decided them; its roundings and scales are changed.

        Returns:
            The error of what is left, and that of nearest.
        """
        decided = run.checkpoint.decide("comparison", "", _Decided, lambda: self._decide(run))
        run.forget_values()
        run.report.clipped = decided.clipped
        nodes = {node.name: node for node in run.nodes}
        for name in decided.taken:
            run.take_back(nodes[name])
        if decided.takes_scales:
            run.take_back_scales()
        return decided.error, decided.nearest_error

    def _decide(self, run: Pass) -> _Decided:
        """Find what does harm, when the pass has come to its end."""
        variances = run.finish().variances
        clipped = run.ranges.clipped(self._processes)
        run.forget_values()
        nearest = found = self.error({}, {}, variances)
        changed = [node.name for node in run.nodes if not run.roundings[node.name].stores(node.nearest)]
        if changed or run.scales:
            found = self.error(run.roundings, run.scales, variances)
        if found <= nearest:
            return _Decided(found, nearest, clipped=clipped)
        run.report.progress.say("taking back what is worse than nearest")

        def without(names: Sequence[str]) -> float:
            """The error with these nearest."""
            left = {name: one for name, one in run.roundings.items() if name not in names}
            return self.error(left, run.scales, variances)

        runs, start = _runs(changed), found
        errors = [without(names) for names in runs]
        taken: list[str] = []
        for error, names in sorted(zip(errors, runs, strict=True), key=lambda one: one[0]):
            if error >= start or found <= nearest:
                break
            again = without([*taken, *names])
            if again < found:
                taken += names
                found = again
        if found > nearest:
            everything = [*taken, *(name for name in changed if name not in taken)]
            return _Decided(nearest, nearest, everything, True, clipped)
        return _Decided(found, nearest, taken, clipped=clipped)


def _runs(names: Sequence[str]) -> list[Sequence[str]]:
    """Neighbours in at most `_RUNS` runs, as equal as they can be."""
    count = min(_RUNS, len(names))
    ends = [len(names) * number // count for number in range(count + 1)] if names else []
    return [names[begin:end] for begin, end in pairwise(ends)]


def _part(
    arguments: Sequence[list[Any]], sampling: Sampling, batch_size: int | None, alone: bool
) -> tuple[list[list[Any]], torch.Tensor]:
    """Batches to compare on, and which of their samples are judged.

    Args:
        arguments, sampling: as of `Comparison`.
        batch_size: the number of samples that the graphs are made for; None for any.
        alone: whether samples may be put together otherwise.
    """
    held = torch.cat([sampling.held_out(batch, size) for batch, size in enumerate(sampling.size)])
    if alone and bool(held.any()):
        numbers = held.nonzero().squeeze(1).tolist()
        judged = len(numbers)
        if batch_size is not None:
            # the graph takes no fewer
            others = (~held).nonzero().squeeze(1).tolist()
            numbers += others[: -judged % batch_size]
        found = put_together(arguments, numbers, batch_size or max(sampling.size))
        if found is not None:
            return found, torch.arange(len(numbers), device="cpu") < judged
    of_batch = torch.split(held, list(sampling.size))
    # of those with held-out samples, if there are such
    usable = [batch for batch, one in enumerate(of_batch) if bool(one.any())] or list(range(len(arguments)))
    sizes = [sampling.size[batch] for batch in usable]
    chosen = [usable[i] for i in whole(sizes, max(_LEAST_SAMPLES, int(held.sum())))]
    return [arguments[batch] for batch in chosen], torch.cat([of_batch[batch] for batch in chosen])
