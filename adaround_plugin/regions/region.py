"""A region of both graphs as a function of the weights in it, with the calibration data at its entry.

A region ends at its *exits*, and begins wherever the two streams have got to: what it computes is everything between
the values that are known and its exits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from adaround_plugin.errors import is_out_of_memory
from adaround_plugin.graph.memory import KeptRows
from adaround_plugin.graph.streams import unpacks
from adaround_plugin.graph.value_files import Kept
from adaround_plugin.hosts.base import ActivationQuantizer, WeightedNode
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.forward import Exit, Forward, Place, Targets
from adaround_plugin.regions.importance import importance, tempered
from adaround_plugin.regions.minibatches import Minibatch
from adaround_plugin.regions.parts import KeptParts, Part, stacked_parts
from adaround_plugin.regions.samples import Rows, gathered

__all__ = ["Drawing", "Region"]

_log = logging.getLogger(__name__)

# samples in one step where no gradient is asked for
_CHUNK = 128


@dataclass(frozen=True)
class Drawing:
    """How minibatches are drawn.

    Attributes:
        batch_size: samples in a minibatch; a program exported for one batch size has that.
        drop: probability with which an activation inside, or at the entry of, a region is left unquantized in a step
            (QDrop, Wei et al. 2022, arXiv 2203.05740).
        weighs_outputs: weigh the entries at the exits by their squared derivative of the network's output (BRECQ, Li et
            al. 2021, arXiv 2102.05426, with the output's own squared error in place of labels).
    """

    batch_size: int = 32
    drop: float = 0.0
    weighs_outputs: bool = False


class Region:
    """Weights between the streams' present place and some exits, and the samples to learn them from.

    It is the `Samples` of `adaround_plugin.regions.minibatches`.

    Args:
        place: how far the pass has got.
        nodes: the weights to learn.
        exits: where the output is compared.
        drawing: how minibatches are drawn.
        propagate_error: take the quantized stream's values at the entry, else the float stream's.
        quantizers: of activations whose scales are learned.

    Attributes:
        nodes: those of the weights all of whose call sites are in the region and can be run with another weight.
        quantizers: those of the activations that are quantized in the region.
        exits: those whose values can be learned from.
        has_samples: whether the leading axis at every exit is one of samples; else none can be held out.
        without_counterpart: entries that the float stream has no value for, which are taken from the quantized stream
            always.
        is_unweighed: whether entries at an exit should be weighed by their importance, which is not known.
        resampled: whether minibatches are drawn from all samples; else they are the caller's batches.
        processes: this one and those that have other samples.
    """

    def __init__(
        self,
        place: Place,
        nodes: Sequence[WeightedNode],
        exits: Sequence[Exit],
        drawing: Drawing,
        *,
        propagate_error: bool = True,
        quantizers: Sequence[ActivationQuantizer] = (),
    ) -> None:
        self._place, self._drawing, self.processes = place, drawing, place.sampling.processes
        self._sampling, self._batch_size = place.sampling, place.host.batch_size
        targets = Targets(place, exits)(place.values[0][0])
        # integers, such as the index of the largest logit, have no error that could be learned from
        self.exits = [end for end, target in zip(exits, targets, strict=True) if _is_learnable(target)]
        self._targets = Targets(place, self.exits)
        self._forward = Forward(place, self.exits, nodes, quantizers, drawing.drop)
        self.nodes, self.quantizers = self._forward.nodes, self._forward.quantizers
        self.without_counterpart = list[str]()
        self.is_unweighed, self.has_samples, self.resampled = False, True, True
        if self.nodes or self.quantizers:
            self._collect(propagate_error)

    def _collect(self, propagate_error: bool) -> None:
        """What minibatches are made of, for every batch or for all samples together."""
        values, sampling = self._place.values, self._sampling
        counterparts = self._forward.float_counterparts(self._place.streams, values[0][0])
        pairs = zip(self._forward.entries, counterparts, strict=True)
        self.without_counterpart = [node.name for node, counterpart in pairs if counterpart is None]
        parts = KeptParts(self._place.memory)
        for batch in range(len(values)):
            part = self._part(batch, counterparts, propagate_error)
            self.has_samples &= all(sampling.has_samples(batch, target.shape[0]) for target in part.targets)
            parts.append(part)
        self.is_unweighed = not self._agree(not self.is_unweighed)
        self.has_samples = self._agree(self.has_samples)
        if self.is_unweighed:
            parts.weigh(None)
        elif self.has_samples and self._drawing.weighs_outputs:
            parts.weigh(_tempering([part.importance for part in parts], sampling))
        if sampling.masks:
            parts.cover(sampling.masks)
        stacked = stacked_parts(parts, sampling.size, self._place.memory)
        self.resampled = self._agree(stacked is not None and self._separable(stacked.entries, parts))
        self.has_samples = self._agree(self.has_samples)
        held = [sampling.held_out(batch, size) & self.has_samples for batch, size in enumerate(sampling.size)]
        self._parts: Sequence[Part] = parts
        self._held = held
        if stacked is not None and self.resampled:
            self._parts, self._held = [stacked], [torch.cat(held)]
        self._learning = [(~of_part).nonzero().flatten() for of_part in self._held]
        own = len(self._learning[0]) if self.resampled else sum(len(one) > 0 for one in self._learning)
        counts = self.processes.gathered("counting what a region learns from", own)
        self._drawn = _shares(self._batch_size or min(self._drawing.batch_size, sampling.total), counts)
        self._processes_that_learn = sum(count > 0 for count in counts)

    def _agree(self, value: bool) -> bool:
        """Whether it is so for the samples of all processes."""
        return self.processes.agree("the samples of a region", value)

    def _part(self, batch: int, counterparts: list[fx.Node | None], propagate_error: bool) -> Part:
        """One of the caller's batches."""
        exact, quantized = self._place.streams
        values = self._place.values[batch]
        entries = [quantized.value(node, values[1]) for node in self._forward.entries]
        floats = [
            entry if counterpart is None else exact.value(counterpart, values[0])
            for entry, counterpart in zip(entries, counterparts, strict=True)
        ]
        # only what the host quantizes can be left unquantized
        dropping = zip(self._forward.entries, floats, strict=True) if self._drawing.drop else ()
        mixed = [value if unpacks(node) else None for node, value in dropping]
        targets = self._targets(values[0])
        return Part(targets, entries if propagate_error else floats, mixed, self._importance(batch, targets))

    def _importance(self, batch: int, targets: list[Tensor]) -> list[Tensor]:
        """Of the entries of one batch's targets; what is not known is left out."""
        if not self._drawing.weighs_outputs:
            return []
        goals = [end.float_node for end in self.exits]
        known_values = self._place.values[batch][0]
        numbers, mask = self._sampling.numbers(batch), self._sampling.mask_of(batch)
        found = importance(self._place.streams[0], goals, targets, known_values, numbers, mask)
        known = [weight for weight in found if weight is not None]
        self.is_unweighed |= len(known) < len(found)
        return known

    def _separable(self, stacked: list[Any], parts: Sequence[Part]) -> bool:
        """Whether samples give the same however they are put together: tried on the float weights."""
        weights, none = [node.weight for node in self.nodes], [None] * len(self.nodes)
        some = [parts[batch] for batch in range(min(len(parts), 1 if self._batch_size else 2))]
        sizes = self._sampling.size[: len(some)]
        count = sum(sizes)
        # in another order, and one less where the graphs take any number, unless they have just seen that one
        less = self._batch_size is None and count - 1 not in (0, *sizes)
        index = torch.arange(count, device="cpu").flip(0)[: count - less]
        try:
            with torch.no_grad():
                apart = [self._forward(part.entries, weights, none) for part in some]
                together = self._forward(gathered(stacked, index), weights, none)
        except Exception as error:
            # whatever a graph raises whose values depend on the size of the batch
            if is_out_of_memory(error):
                raise
            _log.debug("samples cannot be told apart: %s", error)
            return False
        pairs = list(zip(zip(*apart, strict=True), together, strict=True))
        rows = [sum(output.shape[0] for output in outputs) for outputs, _ in pairs]
        self.has_samples &= all(
            total * len(index) == count * output.shape[0] for total, (_, output) in zip(rows, pairs, strict=True)
        )
        return self.has_samples and all(
            _same_rows(torch.cat(outputs), output, count, index) for outputs, output in pairs
        )

    def draw(self, generator: torch.Generator) -> Minibatch:
        """Some learning samples at random: of all, or one of the caller's batches where these cannot be taken apart."""
        if not self.resampled:
            # where there is none to learn from, one that does not count
            usable = [batch for batch, learning in enumerate(self._learning) if len(learning)] or [0]
            batch = usable[int(torch.randint(len(usable), (), generator=generator, device="cpu"))]
            found = self._minibatch(self._parts[batch], ~self._held[batch], generator)
            # batches count alike
            return replace(found, samples=max(1, found.samples) * self._processes_that_learn / self.processes.size)
        learning = self._learning[0]
        size = self._drawn[self.processes.rank]
        chosen = learning[torch.randperm(len(learning), generator=generator, device="cpu")[:size]]
        return replace(self._taken(chosen, generator), samples=sum(self._drawn) / self.processes.size)

    def all(self, held_out: bool, with_gradient: bool = False) -> Iterator[Minibatch]:
        """The learning or the held-out samples, in order, with nothing dropped."""
        at_once = self._batch_size or (self._drawing.batch_size if with_gradient else _CHUNK)
        if not self.resampled:
            for part, held in zip(self._parts, self._held, strict=True):
                if (kept := held == held_out).any():
                    yield self._minibatch(part, kept, None)
            return
        chosen_of_all = (self._held[0] == held_out).nonzero().flatten()
        if not len(chosen_of_all):
            return
        for chosen in torch.split(chosen_of_all, at_once):
            yield self._taken(chosen, None)

    def _taken(self, index: Tensor, generator: torch.Generator | None) -> Minibatch:
        """Some of all samples; filled up with one that does not count, if the graphs want more."""
        missing = (self._batch_size or max(1, len(index))) - len(index)
        kept = torch.arange(len(index) + missing, device="cpu") < len(index)
        index = torch.cat([index, (index[:1] if len(index) else index.new_zeros(1)).expand(missing)])
        return self._minibatch(self._parts[0].gathered(index), kept, generator)

    def _minibatch(self, part: Part, kept: Tensor, generator: torch.Generator | None) -> Minibatch:
        pairs = zip(part.entries, part.exact or [None] * len(part.entries), strict=True)
        entries = [self._forward.dropped(entry, exact, generator) for entry, exact in pairs]

        def run(
            weights: Sequence[Tensor],
            corrections: Sequence[Tensor | None],
            scale_factors: Sequence[Tensor] | None,
        ) -> list[Tensor]:
            outputs = self._forward(entries, weights, corrections, generator=generator, scale_factors=scale_factors)
            return [_selected(output, kept) for output in outputs]

        targets = [_selected(value, kept) for value in part.targets]
        weighed = [_selected(value, kept) for value in part.importance]
        return Minibatch(int(kept.sum()), targets, weighed or None, run)

    def output_scale(self) -> list[float]:
        """Root mean square of the output of each weight's operator, over some samples; 0 where none reaches it."""
        index = torch.arange(self._batch_size or min(_CHUNK, len(self._held[0])), device="cpu")
        part = self._parts[0].gathered(index) if self.resampled else self._parts[0]
        mask, masks = None, self._sampling.masks
        # values without an axis of tokens are put together of batches of several lengths, too, and need none
        if masks and not (self.resampled and len({one.shape[1] for one in masks}) > 1):
            mask = torch.cat(masks)[index.to(masks[0].device)] if self.resampled else masks[0]
        squares: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            weights, none = [node.weight for node in self.nodes], [None] * len(self.nodes)
            self._forward(part.entries, weights, none, squares=squares, mask=mask)
        scales = []
        for node in self.nodes:
            nothing = torch.zeros((), dtype=torch.float32, device=node.weight.device)
            scales.append(torch.stack(squares.get(node.name, [nothing])).mean().sqrt())
        return [float(scale) for scale in self.processes.averaged("the outputs of a region", scales)]


def _tempering(importance: list[list[Tensor]], sampling: Sampling) -> list[list[Tensor]]:
    """Factors for the weights of entries, of each batch at every exit.

    Where few samples carry nearly all of the weight, their totals are made more alike.

    Args:
        importance: of each batch, at every exit.
        sampling: of the batches.
    """
    samples = [
        [sampling.first[batch] + sampling.samples(batch, one.shape[0], one.device) for one in of_batch]
        for batch, of_batch in enumerate(importance)
    ]
    totals = torch.zeros(sampling.total, dtype=torch.float32, device=importance[0][0].device)
    for weights, numbers in zip(importance, samples, strict=True):
        for one, number in zip(weights, numbers, strict=True):
            totals.index_add_(0, number.to(totals.device), _sums(one).to(totals))
    sampling.processes.add("the importance of a region's output", totals)
    factor = tempered(totals)
    return [
        [
            factor.to(one)[number].reshape(-1, *[1] * (one.dim() - 1))
            for one, number in zip(weights, numbers, strict=True)
        ]
        for weights, numbers in zip(importance, samples, strict=True)
    ]


def _shares(wanted: int, counts: Sequence[int]) -> list[int]:
    """How many samples each process draws, so that all have about the same chance: one at least, of what it has."""
    total = max(1, sum(counts))
    ends = [round(wanted * sum(counts[:number]) / total) for number in range(len(counts) + 1)]
    return [min(count, max(1, end - begin)) for count, (begin, end) in zip(counts, pairwise(ends), strict=True)]


def _sums(values: Tensor) -> Tensor:
    """Over all axes but the leading one."""
    return values.sum(tuple(range(1, values.dim()))) if values.dim() > 1 else values


def _is_learnable(target: Any) -> bool:
    return isinstance(target, Tensor) and target.is_floating_point() and target.dim() > 0


def _same_rows(outputs: Tensor, output: Tensor, count: int, index: Tensor) -> bool:
    """Whether `output` has the runs of `outputs` (`count` of them) that `index` names, but for rounding."""
    if outputs.shape[0] % count:
        return False
    expected = Rows(KeptRows(Kept(outputs), outputs.device), outputs.shape[0] // count).take(index)
    return expected.shape == output.shape and bool((expected - output).square().sum() <= 1e-3 * expected.square().sum())


def _selected(output: Tensor, kept: Tensor) -> Tensor:
    """The runs of the leading axis that belong to the samples kept; all where it is no axis of samples."""
    if bool(kept.all()) or not output.dim() or output.shape[0] % len(kept):
        return output
    return output[kept.repeat_interleave(output.shape[0] // len(kept)).to(output.device)]
