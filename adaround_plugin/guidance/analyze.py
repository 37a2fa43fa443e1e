"""`analyze(...)`: what each layer's bits cost at the network's output, from a few passes over the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.backend_config import BackendConfig

from adaround_plugin._version import __version__
from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.guidance.analysis import Analysis
from adaround_plugin.guidance.candidates import Candidate, Scheme, candidates, grid_spec
from adaround_plugin.guidance.effects import effects
from adaround_plugin.guidance.moments import InputMoments, weights_of_columns
from adaround_plugin.guidance.record import LayerAnalysis, Width
from adaround_plugin.hosts.base import Host, Skipped, WeightedNode, open_streams
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning.layerwise import LayerWise
from adaround_plugin.learning.progress import Progress
from adaround_plugin.options import check_alone, check_bool, check_choice, check_seed
from adaround_plugin.regions.binding import bind_batches
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.masks import mask_number
from adaround_plugin.rounding.grid import check_bits
from adaround_plugin.rounding.result import LayerRounding

__all__ = ["analyze"]

_NO_DERIVATIVE = "the network's output has no finite derivative by its output"
_NOT_REACHED = "no sample reached it"


def analyze(
    prepared: nn.Module,
    data: Iterable[Any],
    *,
    bits: Sequence[int] = (2, 3, 4, 6, 8),
    symmetric: Scheme = "observed",
    inputs: Callable[[Any], Any] | None = None,
    token_mask: str | None = None,
    seed: int = 0,
    progress: bool = True,
    backend_config: BackendConfig | None = None,
) -> Analysis:
    """What each layer loses at each bit width, at the network's output, with all other layers in float.

    A forward and a backward pass find what each column of a layer's input counts, and a forward pass the second moments
    of every layer's input. They decide how each weight is rounded at each width by GPTQ, with its scale searched, and
    with rows that make up for each other as by default. A forward and a backward pass then tell what that, and rounding
    to nearest, does to the network's output, to second order in the change of the weight (docs/how-to/choose-bits.md).
    Activations stay in float.

    Args:
        prepared: a calibrated model from `prepare_fx` or `prepare_pt2e`, as for `adaround`; its own bits do not matter.
        data, inputs, token_mask, seed, progress, backend_config: as for `adaround`.
        bits: the widths, each from 2 to 8.
        symmetric: of the grids: `"observed"`, as each layer's observer is; True or False; None, what is more accurate
            at each width, as `symmetric=None` of `get_adaround_qconfig_mapping`.

    Raises:
        InvalidOptionError: an option is out of range, or this is one of several processes of `torch.distributed`.
        InvalidModelError: as for `adaround`, or the network has no derivatives, or none that reaches a layer.
        InvalidBatchError, NonFiniteError: as for `adaround`.
    """
    start = time.perf_counter()
    widths = _checked(bits)
    check_choice("symmetric", symmetric, ("observed", None, True, False))
    check_seed("seed", seed)
    check_bool("progress", progress)
    check_alone()
    host = open_host(prepared, backend_config)
    arguments = bind_batches(host.prepared, host.signature, host.flatten, data, inputs)
    mask = mask_number(token_mask, host.inputs)
    sampling = Sampling.of(arguments, 0, LayerWise().max_columns, seed, mask=mask)
    sampling.check_tokens()
    setup = time.perf_counter() - start
    nodes, skipped = _differentiable(host)
    if not nodes:
        raise _none(skipped)
    with torch.no_grad(), Progress(progress) as bar:
        found = _Passes(host, nodes, arguments, sampling, bar).run(widths, symmetric)
    layers = []
    for node in nodes:
        if node.name in found.losses:
            layers.append(_layer(node, found.candidates[node.name], found.losses[node.name], symmetric))
        else:
            reason = _NO_DERIVATIVE if node.name in found.candidates else _NOT_REACHED
            skipped.append(Skipped(node.name, node.kind, reason))
    if not layers:
        raise _none(skipped)
    return Analysis(
        layers=layers,
        skipped=[(one.name, one.kind, one.reason) for one in skipped],
        bits=widths,
        samples=sampling.total,
        seconds={"setup": setup, **found.seconds, "total": time.perf_counter() - start},
        versions={"adaround_plugin": __version__, "torch": str(torch.__version__)},
    )


def _none(skipped: Sequence[Skipped]) -> InvalidModelError:
    """That no layer can be analysed, and why."""
    reasons = "; ".join(f"{one.name}: {one.reason}" for one in skipped)
    return InvalidModelError("prepared", f"no layer can be analysed ({reasons})", "Check the model's outputs.")


def _checked(bits: Sequence[int]) -> tuple[int, ...]:
    """The widths in order, each once."""
    if isinstance(bits, str) or not isinstance(bits, Iterable) or not (given := list(bits)):
        raise InvalidOptionError("bits", f"{bits!r} has no bit widths", "Pass a list of integers from 2 to 8.")
    return tuple(sorted({check_bits(one, "bits") for one in given}))


def _differentiable(host: Host) -> tuple[list[WeightedNode], list[Skipped]]:
    """The layers whose operators can be run from outside, and what is skipped."""
    nodes, skipped = [], list(host.skipped)
    for node in host.nodes:
        if all(site.call is not None for site in node.sites):
            nodes.append(node)
        else:
            skipped.append(Skipped(node.name, node.kind, "its bias is computed, so that no derivative can be taken"))
    return nodes, skipped


@dataclass(frozen=True)
class _Found:
    """What the passes found.

    Attributes:
        candidates: by name of the layers that a sample reached, at each width.
        losses: `(2 * widths,)` by name, of nearest and learned in turn; only where they are numbers.
        seconds: by phase.
    """

    candidates: dict[str, list[Candidate]]
    losses: dict[str, Tensor]
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Passes:
    """The passes over the data; arguments as of `analyze`, bound."""

    host: Host
    nodes: list[WeightedNode]
    arguments: Sequence[list[Any]]
    sampling: Sampling
    bar: Progress

    def run(self, widths: Sequence[int], symmetric: Scheme) -> _Found:
        """Forward and backward for what columns count, forward for moments, forward and backward for losses.

        Raises:
            InvalidModelError: an operator has no derivative.
        """
        clock = [time.perf_counter()]
        stream, _ = open_streams(self.host)
        found: dict[str, list[Candidate]] = {}
        try:
            self.bar.say("what columns count")
            weights = weights_of_columns(self.host, stream, self.nodes, self.arguments, self.sampling)
            clock.append(time.perf_counter())
            self.bar.stage("rounding", len(self.nodes))
            moments = InputMoments(stream, self.arguments, self.sampling, weights)
            for node, of_node, damping in moments.of(self.nodes):
                if of_node.count:
                    outputs = weights.outputs.get(node.name)
                    found[node.name] = candidates(node, of_node, widths, symmetric, damping, outputs)
                weights.forget(node)
                self.bar.passed(node.name)
            clock.append(time.perf_counter())
            self.bar.stage("taking derivatives", self.sampling.total, "sample")
            losses = effects(
                stream,
                [node for node in self.nodes if node.name in found],
                {name: _roundings(every) for name, every in found.items()},
                self.arguments,
                self.sampling,
                moments.variances,
                is_fixed=self.host.batch_size is not None,
                told=self.bar.move,
            )
        except InvalidOptionError as error:
            remedy = "Losses are estimated by them: give the operator one, or analyze the network without it."
            raise InvalidModelError("prepared", error.problem, remedy) from error
        clock.append(time.perf_counter())
        phases = zip(("importance", "forward", "derivatives"), pairwise(clock), strict=True)
        seconds = {phase: end - begin for phase, (begin, end) in phases}
        return _Found(found, {name: one for name, one in losses.items() if bool(torch.isfinite(one).all())}, seconds)


def _roundings(found: Sequence[Candidate]) -> list[LayerRounding]:
    return [rounding for one in found for rounding in (one.nearest, one.learned)]


def _layer(node: WeightedNode, found: Sequence[Candidate], losses: Tensor, symmetric: Scheme) -> LayerAnalysis:
    pairs = losses.reshape(len(found), 2).tolist()
    widths = tuple(
        Width(one.bits, _bytes(node, one.bits, symmetric), nearest, learned)
        for one, (nearest, learned) in zip(found, pairs, strict=True)
    )
    shape = tuple(node.weight.shape)
    return LayerAnalysis(node.name, node.kind, node.names[1:], shape, node.weight.numel(), widths)


def _bytes(node: WeightedNode, bits: int, symmetric: Scheme) -> int:
    """Of a weight packed at a width, with its scales, and a byte for each zero point."""
    spec = grid_spec(node, bits, symmetric)
    each = spec.scale_dtype.itemsize + (0 if spec.symmetric else 1)
    return -(-node.weight.numel() * bits // 8) + node.grid.scale.numel() * each
