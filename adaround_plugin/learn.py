"""`adaround(...)`: the only place where order is decided. Streams forward, moments, rounding, layer after layer."""

from __future__ import annotations

import copy
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.backend_config import BackendConfig
from tqdm import tqdm

from .calibration import Sampling, bind_batches
from .errors import InvalidOptionError, NonFiniteError
from .graph.prepared_fx import PreparedFX
from .graph.streams import Stream, Values, tensors
from .graph.weighted_node import CallSite, Skipped, WeightedNode
from .layer import Layer, LayerRounding, Recipe
from .moments import Moments
from .problem import Solver
from .report import KEY, LayerReport, RecipeTrial, Report
from .solvers import Nearest, Sequential, get_solver

__all__ = ["adaround"]

Exclude = Iterable[str | type[nn.Module]]

# the moments of layers that are ready together are gathered together, as many as fit in this many bytes
_MOMENT_BYTES = 2 * 2**30
# "auto" tries its recipes on about this many samples
_TRIAL_SAMPLES = 128


class Learner:
    """One pass over a host's graph with one recipe.

    Attributes:
        roundings: what was decided, by name of the weighted node.
        reports: one per learned layer, in the order solved.
        output_error: of the network's output, relative to its variance.
        seconds: by phase.
    """

    def __init__(
        self,
        host: PreparedFX,
        bound: list[list[Any]],
        sampling: Sampling,
        solver: Solver,
        recipe: Recipe,
        frozen: set[str],
        scale: str,
        up_or_down: bool,
        progress: tqdm[Any] | None,
    ) -> None:
        self.host, self.sampling, self.solver, self.recipe = host, sampling, solver, recipe
        self.frozen, self.scale, self.up_or_down, self.progress = frozen, scale, up_or_down, progress
        self.streams = (host.float_stream, host.quantized_stream)
        self.values: list[tuple[Values, Values]] = [
            (host.float_stream.bind(arguments), host.quantized_stream.bind(arguments)) for arguments in bound
        ]
        self.roundings: dict[str, LayerRounding] = {}
        self.reports: list[LayerReport] = []
        self.output_error = 0.0
        self.seconds: dict[str, float] = defaultdict(float)

    def run(self) -> None:
        """Decide every layer, then compare the network's outputs."""
        for stream in self.streams:
            stream.restart()
        for node in self.host.nodes:
            baseline = self._baseline(node)
            node.set_quantized(baseline)
            if node.name in self.frozen:
                self.roundings[node.name] = baseline
        pending = [node for node in self.host.nodes if node.name not in self.frozen]
        while pending:
            pending = self._stage(pending)
        self._advance(())
        self._compare_outputs()

    def _baseline(self, node: WeightedNode) -> LayerRounding:
        return LayerRounding(node.grid, node.grid.nearest(node.weight), None, False, 0.0, 0.0, None, None)

    def _stage(self, pending: list[WeightedNode]) -> list[WeightedNode]:
        """Advance both streams to the next weighted nodes and decide these; returns what is left."""
        plan = self._plan(pending)
        ready = [node for node in pending if all(self._reached(site, plan) for site in node.sites)]
        if not ready:
            # a weight that feeds itself through another call site: look ahead with roundings as they are
            first = pending[0]
            self._decide(first, *self._look_ahead(first, pending))
            return pending[1:]
        ready = _fitting(ready)
        gathered = {node.name: self._empty(node) for node in ready}
        needed = tuple(stream.finish(nodes) for stream, nodes in zip(self.streams, plan, strict=True))
        for batch, values in enumerate(self.values):
            with self._clock("forward"):
                for stream, nodes, of_batch in zip(self.streams, plan, values, strict=True):
                    stream.run_nodes(of_batch, nodes)
            for node in ready:
                with self._clock("moments"):
                    for site in node.sites:
                        self._gather(node, site, batch, values, *gathered[node.name])
            for of_batch, keep in zip(values, needed, strict=True):
                for dead in of_batch.keys() - keep:
                    del of_batch[dead]
        for node in ready:
            self._decide(node, *gathered.pop(node.name))
        decided = {node.name for node in ready}
        return [node for node in pending if node.name not in decided]

    def _plan(self, pending: list[WeightedNode]) -> tuple[list[fx.Node], list[fx.Node]]:
        sites = [site for node in pending for site in node.sites]
        return (
            self.streams[0].runnable({site.float_node for site in sites}),
            self.streams[1].runnable({site.quantized_node for site in sites}),
        )

    def _reached(self, site: CallSite, plan: tuple[list[fx.Node], list[fx.Node]]) -> bool:
        return self.streams[0].reaches(site.float_node, plan[0]) and self.streams[1].reaches(
            site.quantized_node, plan[1]
        )

    def _advance(self, pending: Iterable[WeightedNode]) -> None:
        """Run what can be run, for every batch."""
        plan = self._plan(list(pending))
        needed = tuple(stream.finish(nodes) for stream, nodes in zip(self.streams, plan, strict=True))
        for values in self.values:
            with self._clock("forward"):
                for stream, nodes, of_batch, keep in zip(self.streams, plan, values, needed, strict=True):
                    stream.run_nodes(of_batch, nodes)
                    for dead in of_batch.keys() - keep:
                        del of_batch[dead]

    def _look_ahead(self, node: WeightedNode, pending: list[WeightedNode]) -> tuple[Moments, Moments]:
        """Moments of a weight over call sites that depend on one another; what runs here is run again later."""
        moments = self._empty(node)
        plan = self._plan([])
        for batch, values in enumerate(self.values):
            copies: tuple[Values, Values] = (dict(values[0]), dict(values[1]))
            with self._clock("forward"):
                for stream, nodes, of_batch in zip(self.streams, plan, copies, strict=True):
                    stream.run_nodes(of_batch, nodes)
            with self._clock("moments"):
                for site in node.sites:
                    self._gather(node, site, batch, copies, *moments)
        return moments

    def _empty(self, node: WeightedNode) -> tuple[Moments, Moments]:
        """Moments for the learning and for the held-out samples."""
        size = node.op.rows(node.weight).shape
        device = node.weight.device
        return Moments(*size, device), Moments(*size, device)

    def _gather(
        self,
        node: WeightedNode,
        site: CallSite,
        batch: int,
        values: tuple[Values, Values],
        moments: Moments,
        holdout: Moments,
    ) -> None:
        """Add one batch's columns at one call site."""
        x_float = self.streams[0].value(_input(site.float_node), values[0])
        x_quantized = self.streams[1].value(_input(site.quantized_node), values[1])
        shape = node.weight.shape
        patches = node.op.patches(x_quantized.float(), shape)
        index, position = self.sampling.columns(batch, patches, len(node.sites))
        quantized = patches.columns(index, position)
        exact = node.op.patches(x_float, shape).columns(index, position)
        rows = node.op.rows(node.weight)
        deviation = (exact - quantized) @ rows.transpose(1, 2)
        weight = _column_weight(exact, index, patches.samples, self.recipe)
        if not (torch.isfinite(deviation).all() and torch.isfinite(quantized.sum())):
            raise NonFiniteError(
                f"layer {node.name!r}", "its input holds NaN or infinity", "Check the model and the calibration data."
            )
        held = self.sampling.held_out(batch, patches.samples, index.device)[index]
        for part, chosen in ((moments, ~held), (holdout, held)):
            if chosen.all():
                part.add(quantized, deviation, weight)
            else:
                part.add(quantized[:, chosen], deviation[:, chosen], weight[:, chosen])

    def _decide(self, node: WeightedNode, moments: Moments, holdout: Moments) -> None:
        """Learn one layer's rounding and put it into the quantized stream."""
        start = time.perf_counter()
        layer = Layer(node.op, node.weight, node.grid, moments.finish(), holdout.finish())
        recipe = replace(self.recipe, correct_bias=self.recipe.correct_bias and node.has_bias)
        search = self.scale == "search" or (self.scale == "auto" and not node.keeps_scale)
        rounding = layer.learn(recipe, self.solver, search, self.up_or_down)
        node.set_quantized(rounding)
        self.roundings[node.name] = rounding
        seconds = time.perf_counter() - start
        self.seconds["solve"] += seconds
        self.reports.append(_layer_report(node, rounding, self.recipe, moments.count + holdout.count, seconds))
        if self.progress is not None:
            self.progress.set_postfix_str(
                f"{node.name} {rounding.nearest_error:.2e} -> {rounding.learned_error:.2e}", refresh=False
            )
            self.progress.update()

    def _compare_outputs(self) -> None:
        """Relative error of the network's outputs on held-out samples, or on all if none is held out."""
        error = power = 0.0
        for batch, values in enumerate(self.values):
            outputs = [
                tensors(stream.value(stream.output_node.args[0], of_batch))
                for stream, of_batch in zip(self.streams, values, strict=True)
            ]
            for exact, quantized in zip(*outputs, strict=True):
                if self.sampling.every and exact.dim():
                    held = self.sampling.held_out(batch, exact.shape[0], exact.device)
                    exact, quantized = exact[held], quantized[held]
                error += float((exact - quantized).double().square().sum())
                power += float((exact.double() - exact.double().mean()).square().sum()) if exact.numel() else 0.0
        self.output_error = error / power if power > 0 else error

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


def _input(node: fx.Node) -> Any:
    """The activation input of a weighted node."""
    return node.args[0] if node.args else node.kwargs["input"]


def _fitting(ready: list[WeightedNode]) -> list[WeightedNode]:
    """As many of the ready nodes as have moments that fit in memory together; at least one."""
    taken, used = [], 0
    for node in ready:
        used += 2 * Moments.bytes(*node.op.rows(node.weight).shape)
        if taken and used > _MOMENT_BYTES:
            break
        taken.append(node)
    return taken


def _column_weight(exact: Tensor, index: Tensor, length: int, recipe: Recipe) -> Tensor:
    """`(G, n)` weights: 1, or `1 / |x|^2` with the norm floored at a hundredth of the mean in the same sample."""
    if recipe.column_weighting == "none":
        return torch.ones(exact.shape[:2], device=exact.device)
    power = exact.square().sum(2)
    total = power.new_zeros(power.shape[0], length).index_add_(1, index, power)
    count = torch.bincount(index, minlength=length).clamp_min(1)
    floor = 0.01 * (total / count)[:, index]
    return torch.where(floor > 0, 1 / (power + floor), 0.0)


def _layer_report(
    node: WeightedNode, rounding: LayerRounding, recipe: Recipe, columns: int, seconds: float
) -> LayerReport:
    integers, grid = rounding.integers, rounding.grid
    real = grid.coordinates(node.weight)
    total = max(1, integers.numel())
    notes = []
    if not rounding.learned:
        notes.append("nearest kept: it is better on held-out samples")
    if recipe.correct_bias and not node.has_bias:
        notes.append("no bias to correct")
    bias = "kept"
    if rounding.bias_correction is not None:
        bias = "corrected"
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
        bias=bias,
        columns=columns,
        seconds=seconds,
        note="; ".join(notes),
    )


def adaround(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    solver: str | Solver = "annealing",
    inputs: Callable[[Any], Any] | None = None,
    exclude: Exclude = (),
    scale: Literal["auto", "observer", "search"] = "auto",
    asymmetric: bool | Literal["auto"] = "auto",
    correct_bias: bool | Literal["auto"] = "auto",
    column_weighting: Literal["auto", "none", "inverse_norm"] = "auto",
    damping: float | Literal["auto"] = "auto",
    rounding: Literal["grid", "up_or_down"] = "grid",
    holdout: float = 0.125,
    max_columns: int = 32768,
    backend_config: BackendConfig | None = None,
    progress: bool = True,
    seed: int = 0,
    inplace: bool = False,
) -> fx.GraphModule:
    """Learn the rounding of every quantized weight; the line between calibration and conversion.

    Layers are decided in the order of the graph, each from the float and the quantized stream of activations
    (AdaRound, arXiv 2004.10568, equation 25 without its activation function; see docs/explanation/method.md). The
    result goes into the host's own convert, which reproduces the learned integers exactly.

    Args:
        prepared: a calibrated model from `prepare_fx`, with `AdaRoundObserver` or torch's own weight observers.
        batches: unlabelled calibration data: a DataLoader, a list, any iterable of tensors, tuples (positional) or
            dicts (keyword arguments). A few hundred samples do. A one-shot iterator is read once and kept in memory.
        solver: `"annealing"`, `"coordinate_descent"`, `"sequential"`, `"nearest"`, or an object with `solve`.
        inputs: maps a batch to the model's inputs, such as `lambda batch: batch[0]` to drop labels.
        exclude: names (a parent's name covers its children), regular expressions on names, or module types. Excluded
            layers are rounded to nearest on their own grid.
        scale: `"observer"` keeps the observer's scale, `"search"` chooses scale and zero point under the layer's data;
            `"auto"` searches for `AdaRoundObserver` and keeps the scale of others.
        asymmetric: imitate the float output from the quantized input, else from the same input.
        correct_bias: let biases absorb the mean error; a module without a bias gets one.
        column_weighting: `"none"`, or `"inverse_norm"` for networks with massive activations.
        damping: ridge on the hessian relative to its mean diagonal.
            These four, where `"auto"`, are decided together by the error of the network's output on held-out samples,
            in trials on part of the data.
        rounding: `"grid"` lets an integer be any on the grid, `"up_or_down"` only floor or ceil, as in the paper.
        holdout: share of the samples kept out of learning; a layer that is worse there than nearest keeps nearest.
        max_columns: at most about this many columns of a layer's design matrix enter its moments.
        backend_config: the one given to `prepare_fx`, if any (the weight-only one is recognized).
        progress: show a progress bar.
        seed: shifts the subsample of columns. The same seed, data and machine give the same integers.
        inplace: change `prepared` itself instead of a deep copy.

    Returns:
        The prepared model with learned weights, biases and frozen weight observers, to be converted by the host;
        `get_report` reads what was done.

    Raises:
        InvalidOptionError: an option is out of range, or a name in `exclude` matches nothing.
        InvalidModelError: not prepared, not calibrated, in train mode, not float32, or nothing to quantize.
        InvalidBatchError: no batches, or one that does not fit the model.
        NonFiniteError: NaN or infinity in weights or activations; the layer is named.
    """
    start = time.perf_counter()
    chosen = get_solver(solver)
    _check_options(scale, rounding, holdout, max_columns, damping, column_weighting)
    host = PreparedFX(prepared, backend_config)
    frozen = _excluded(host, exclude)
    bound = bind_batches(host.prepared, batches, inputs)
    recipes = _recipes(isinstance(chosen, Nearest), asymmetric, correct_bias, column_weighting, damping)
    total = len(host.nodes) - len(frozen)
    with torch.no_grad(), tqdm(total=total, desc="AdaRound", unit="layer", disable=not progress) as bar:
        trials: list[RecipeTrial] = []
        if len(recipes) > 1:
            bar.set_postfix_str("choosing a recipe")
            recipes, trials = _try(host, bound, recipes, frozen, scale, rounding, holdout, seed)
        tried = time.perf_counter() - start
        sampling = Sampling.of(bound, holdout, max_columns, seed)
        learner = Learner(
            host, bound, sampling, chosen, recipes[0], frozen, scale, rounding == "up_or_down", bar
        )
        bound.clear()
        learner.run()
        model = host.prepared if inplace else copy.deepcopy(host.prepared)
        host.write(model, learner.roundings)
    skipped = [*host.skipped, *_excluded_entries(host, frozen)]
    model.meta[KEY] = Report(
        solver=type(chosen).__name__,
        recipe=_describe(recipes[0]),
        layers=learner.reports,
        skipped=[(entry.name, entry.kind, entry.reason) for entry in skipped],
        trials=trials,
        output_error=learner.output_error,
        seconds={**learner.seconds, "trials": tried, "total": time.perf_counter() - start},
    )
    return model


def _check_options(
    scale: str, rounding: str, holdout: float, max_columns: int, damping: float | str, column_weighting: str
) -> None:
    for name, value, allowed in (
        ("scale", scale, ("auto", "observer", "search")),
        ("rounding", rounding, ("grid", "up_or_down")),
        ("column_weighting", column_weighting, ("auto", "none", "inverse_norm")),
    ):
        if value not in allowed:
            raise InvalidOptionError(name, f"{value!r} is not known", f"Pass one of {list(allowed)}.")
    if not 0 <= holdout <= 0.5:
        raise InvalidOptionError("holdout", f"{holdout!r} is not a share", "Pass a number from 0 to 0.5.")
    if max_columns < 1:
        raise InvalidOptionError("max_columns", f"{max_columns!r} is not positive", "Pass at least 1.")
    if damping != "auto" and not (isinstance(damping, int | float) and damping > 0):
        raise InvalidOptionError("damping", f"{damping!r} is not positive", "Pass a positive number, or 'auto'.")


def _excluded(host: PreparedFX, exclude: Exclude) -> set[str]:
    """Names of the weighted nodes that the caller excludes."""
    if isinstance(exclude, str | type):
        exclude = (exclude,)
    found: set[str] = set()
    known = [(node.name, name) for node in host.nodes for name in node.names]
    known += [("", entry.name) for entry in host.skipped]
    for entry in exclude:
        if isinstance(entry, str):
            hits = [n for n, name in known if name == entry or name.startswith(entry + ".") or re.fullmatch(entry, name)]
        else:
            hits = [node.name for node in host.nodes if host.is_type(node, entry)]
        if not hits and isinstance(entry, str):
            raise InvalidOptionError(
                "exclude", f"{entry!r} matches no weighted layer", f"Known: {[name for _, name in known]}."
            )
        found.update(hits)
    return found - {""}


def _excluded_entries(host: PreparedFX, frozen: set[str]) -> list[Skipped]:
    reason = "excluded by the caller: rounded to nearest on its grid"
    return [Skipped(node.name, node.kind, reason) for node in host.nodes if node.name in frozen]


def _recipes(
    nearest: bool, asymmetric: Any, correct_bias: Any, column_weighting: Any, damping: Any
) -> list[Recipe]:
    """The recipes that the caller's options leave open; the best known for convolutional networks first."""
    if nearest:
        # the baseline: nothing is imitated, so only what the caller asks for by name is done
        plain = Recipe(False, False, "none", 0.01)
        candidates = [plain]
    else:
        candidates = [
            Recipe(True, True, "none", 0.01),
            Recipe(True, True, "inverse_norm", 0.1),
            Recipe(False, True, "inverse_norm", 0.01),
            Recipe(False, False, "none", 0.01),
        ]
    given = {
        name: value
        for name, value in (
            ("asymmetric", asymmetric),
            ("correct_bias", correct_bias),
            ("column_weighting", column_weighting),
            ("damping", damping),
        )
        if value != "auto"
    }
    return list(dict.fromkeys(replace(candidate, **given) for candidate in candidates))


def _describe(recipe: Recipe) -> str:
    return (
        f"{'asymmetric' if recipe.asymmetric else 'symmetric'}, bias {'corrected' if recipe.correct_bias else 'kept'}, "
        f"column weighting {recipe.column_weighting}, damping {recipe.damping:g}"
    )


def _try(
    host: PreparedFX,
    bound: list[list[Any]],
    recipes: list[Recipe],
    frozen: set[str],
    scale: str,
    rounding: str,
    holdout: float,
    seed: int,
) -> tuple[list[Recipe], list[RecipeTrial]]:
    """Try recipes by sequential rounding on part of the data; the one with the smallest output error comes back."""
    size = [Sampling.of([arguments], 0, 1, 0).total for arguments in bound]
    step = max(1, sum(size) // _TRIAL_SAMPLES)
    part = bound[:: min(step, len(bound))] if len(bound) > 1 else bound
    sampling = Sampling.of(part, holdout, 8192, seed)
    trials = []
    for recipe in recipes:
        learner = Learner(host, part, sampling, Sequential(), recipe, frozen, scale, rounding == "up_or_down", None)
        learner.run()
        trials.append(RecipeTrial(_describe(recipe), learner.output_error))
    best = min(range(len(recipes)), key=lambda i: trials[i].output_error)
    return [recipes[best]], trials
