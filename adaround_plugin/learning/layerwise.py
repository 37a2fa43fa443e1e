"""Layer by layer: each weight is rounded under the second moments of its layer's input (docs/explanation/method.md)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from adaround_plugin.graph.streams import BothValues
from adaround_plugin.hosts.base import Host, WeightedNode
from adaround_plugin.learning.columns import Columns, LayerMoments
from adaround_plugin.learning.layer import Layer, Recipe
from adaround_plugin.learning.passes import Pass
from adaround_plugin.options import check_choice, check_integer, check_number, named
from adaround_plugin.report import BlockReport
from adaround_plugin.rounding.across import MOST_ROWS, shape_of_coupled
from adaround_plugin.rounding.problem import Solver
from adaround_plugin.rounding.result import LayerRounding
from adaround_plugin.solvers import Nearest, get_solver

__all__ = ["LayerWise", "PendingLayers"]

# the moments of layers that are ready together are gathered together, as many as fit in this many bytes
_MOMENT_BYTES = 2 * 2**30

Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class LayerWise:
    """Decide layer after layer, each by the squared error of its own output.

    The five options from `propagate_error` to `output_hessian` make a recipe. Where some of them are `"auto"`, a few
    recipes are tried on part of the data; the first is taken unless the network's output says clearly that another
    is better (docs/explanation/method.md).

    Attributes:
        solver: of each layer's rounding problem: `"annealing"`, `"coordinate_descent"`, `"gptq"`, `"nearest"`,
            `"relaxation"`, or an object with `solve`.
        search_scale: choose scale and zero point under the layer's data, else keep the observer's. `"auto"` searches
            for AdaRound's weight observers, and keeps the scale of other observers and for the method `"nearest"`.
        propagate_error: imitate the float output from the quantized input, so that a layer makes up for errors of those
            before it; else from the same input.
        correct_bias: let biases absorb the mean error; a module without a bias gets one.
        column_weighting: what each column of a layer's input counts: `"none"`, all alike; `"inverse_norm"`, for
            networks with massive activations; `"fisher"`, by how much the network's output changes with the layer's
            there, which takes one more forward and one backward pass.
        damping: ridge on the hessian relative to its mean diagonal. `"auto"` is 0.01, and more in a layer where the
            samples differ much (`SampleSpread.damping`).
        output_hessian: let the rows of a layer make up for each other, by the second moment of the derivatives of the
            network's output by the layer's outputs, which takes the same passes as `"fisher"`; channels of a depthwise
            convolution, too. `"auto"` does so where the network has derivatives; recipes are tried without it.
        levels: the integers that a weight may take: `"all"` of its grid, or `"up_or_down"`, floor and ceil alone, as in
            the paper.
        holdout: share of the samples kept out of learning; a layer that is worse there than nearest keeps nearest.
        max_columns: at most about this many columns of a layer's design matrix enter its moments (a quarter of that for
            a convolution of four groups or more), or four for each weight of an output channel where that is more.

    Raises:
        InvalidOptionError: an option is out of range.
    """

    solver: str | Solver = "annealing"
    search_scale: bool | Auto = "auto"
    propagate_error: bool | Auto = "auto"
    correct_bias: bool | Auto = "auto"
    column_weighting: Literal["auto", "none", "inverse_norm", "fisher"] = "auto"
    damping: float | Auto = "auto"
    output_hessian: bool | Auto = "auto"
    levels: Literal["all", "up_or_down"] = "all"
    holdout: float = 0.125
    max_columns: int = 16384

    def __post_init__(self) -> None:
        get_solver(self.solver, "LayerWise.solver")
        for name in ("search_scale", "propagate_error", "correct_bias", "output_hessian"):
            check_choice(*named(self, name), choices=("auto", True, False))
        check_choice(*named(self, "column_weighting"), choices=("auto", "none", "inverse_norm", "fisher"))
        check_choice(*named(self, "levels"), choices=("all", "up_or_down"))
        if self.damping != "auto":
            check_number(*named(self, "damping"), above=0)
        check_number(*named(self, "holdout"), least=0, most=0.5)
        check_integer(*named(self, "max_columns"), least=1)

    @property
    def layers(self) -> LayerWise:
        """How layers are decided: this."""
        return self

    @property
    def is_baseline(self) -> bool:
        """Whether this is round-to-nearest, with nothing learned after it."""
        return isinstance(get_solver(self.solver), Nearest)

    def check(self, host: Host) -> None:
        """Every network will do."""

    def with_layers(self, layers: LayerWise) -> LayerWise:
        """The method whose layers are decided so."""
        return layers

    def recipes(self, is_baseline: bool = False) -> list[Recipe]:
        """The recipes that the options leave open.

        A baseline imitates nothing: only what is asked for by name is done.

        The first is the best measured on most networks, the second needs no derivatives, the third is for networks with
        massive activations (docs/explanation/method.md).
        """
        candidates = [Recipe(False, False, "none", "auto")]
        if not is_baseline:
            candidates = [
                Recipe(True, True, "fisher", "auto", True),
                Recipe(True, True, "none", "auto", True),
                Recipe(True, True, "inverse_norm", "auto", True),
            ]
        given = {name: getattr(self, name) for name in asdict(candidates[0]) if getattr(self, name) != "auto"}
        return list(dict.fromkeys(replace(candidate, **given) for candidate in candidates))

    def without_derivatives(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        """What is left of these recipes where the network has no derivatives; what is asked for by name stays."""
        if self.column_weighting == "auto":
            recipes = [recipe for recipe in recipes if recipe.column_weighting != "fisher"]
        if self.output_hessian == "auto":
            recipes = [replace(recipe, output_hessian=False) for recipe in recipes]
        return list(dict.fromkeys(recipes))

    def with_recipe(self, recipe: Recipe) -> LayerWise:
        """These options, with the recipe's in place of what was open."""
        return replace(self, **asdict(recipe))

    @property
    def recipe(self) -> Recipe:
        """The recipe, where none of it is open but the damping, which each layer chooses."""
        values = {name: getattr(self, name) for name in asdict(Recipe())}
        assert all(value != "auto" for name, value in values.items() if name != "damping")
        return Recipe(**values)

    def searches_scale(self, node: WeightedNode) -> bool:
        """Whether the scale of this weight is searched; else the observer's is kept."""
        return not node.keeps_scale if self.search_scale == "auto" else self.search_scale

    def learn(self, run: Pass) -> None:
        """Decide every layer of a pass."""
        PendingLayers(run, self).decide_all()


# what a checkpoint calls what is decided here
_DECISION = "layer"


@dataclass(frozen=True)
class _Decided:
    """What was decided for a layer, and what the report is told.

    Attributes:
        rounding: as it is stored.
        notes: anything unusual.
        columns: how many entered its moments.
        seconds: that it took.
        blocks: what was learned on samples in between.
    """

    rounding: LayerRounding
    notes: list[str]
    columns: int
    seconds: float
    blocks: list[BlockReport]


# called with a layer once it is decided; returns the rounding to keep, and notes for the report
AfterLayer = Callable[[WeightedNode, Layer, LayerRounding], tuple[LayerRounding, list[str]]]


class PendingLayers:
    """The layers of a pass that are still to be decided.

    Args:
        run: the pass.
        settings: how they are decided; nothing of the recipe is `"auto"` any more but the damping.
        after: called with each layer right after it is decided, to learn its rounding on.

    Attributes:
        recipe: by which they are decided.
        pending: what is left, in graph order.
    """

    def __init__(self, run: Pass, settings: LayerWise, after: AfterLayer | None = None) -> None:
        self._run, self._settings, self._after = run, settings, after
        self.recipe, self._solver = settings.recipe, get_solver(settings.solver)
        self.pending = run.nodes
        decided = all(run.checkpoint.has(_DECISION, node.name) for node in self.pending)
        self._columns = Columns(run, self.recipe.column_weighting, self.recipe.output_hessian, decided=decided)

    def decide_all(self) -> None:
        """Decide all that is left."""
        while self.pending:
            self.decide_next()

    def advance(self) -> None:
        """Run both streams as far as the layers decided so far allow."""
        self._run.forward(self._run.plan(self.pending))

    def decide(self, names: Collection[str]) -> None:
        """Decide the layers of these names, and as few others as they wait for."""
        while any(node.name in names for node in self.pending):
            self.decide_next(names)

    def decide_next(self, names: Collection[str] = ()) -> None:
        """Advance both streams to the next weighted nodes and decide these.

        Of the nodes reached those of `names` come first, the others when none of these is.
        """
        run = self._run
        plan = run.plan(self.pending)
        reached = [node for node in self.pending if run.reaches(node, plan)]
        candidates = reached or self.pending
        named = [node for node in candidates if node.name in names] or candidates
        ready = _fitting(named, self._columns.weights.outputs) if reached else named[:1]
        open_ = [node for node in ready if not run.checkpoint.has(_DECISION, node.name)]
        samples = run.sampling.own if self.recipe.damping == "auto" else None
        recipe = self.recipe
        moments = {
            node.name: LayerMoments(node, recipe.column_weighting, samples, node.name in self._columns.weights.outputs)
            for node in open_
        }

        def gather(batch: int, values: BothValues) -> None:
            for node in open_:
                self._columns.gather(node, batch, values, moments[node.name])

        if reached:
            run.forward(plan, gather)
        else:
            # a weight that feeds itself through another call site: look ahead with roundings as they are
            run.look_ahead(gather)
        for node in ready:
            self._decide(node, moments.pop(node.name, None))
        decided = {node.name for node in ready}
        self.pending = [node for node in self.pending if node.name not in decided]

    def _decide(self, node: WeightedNode, moments: LayerMoments | None) -> None:
        """Put one layer's rounding into the quantized stream, and tell the report.

        Args:
            node: the layer.
            moments: to learn it from; None where the decision is known.
        """
        run = self._run

        def make() -> _Decided:
            assert moments is not None
            return self._learn(node, moments)

        blocks = len(run.report.blocks)
        decided = run.checkpoint.decide(_DECISION, node.name, _Decided, make)
        if run.is_trial:
            return
        if moments is None:
            self._columns.weights.forget(node)
        run.keep_rounding(node, decided.rounding)
        run.report.blocks[blocks:] = decided.blocks
        run.report.layer(node, decided.rounding, decided.notes, decided.columns, decided.seconds)

    def _learn(self, node: WeightedNode, moments: LayerMoments) -> _Decided:
        """Learn one layer's rounding."""
        run, settings, blocks = self._run, self._settings, len(self._run.report.blocks)
        with run.clock("moments", node):
            moments.finish(node, run.sampling.processes)
        outputs = self._columns.weights.outputs.get(node.name)
        # trials search once for all
        known = {} if run.shared is None else run.shared.grids
        grid = known.get(node.name, node.grid)
        processes = run.sampling.processes
        layer = Layer(node.op, node.weight, grid, moments.learning, moments.holdout, outputs, moments.across, processes)
        recipe = replace(
            self.recipe,
            correct_bias=self.recipe.correct_bias and node.bias != "fixed",
            damping=moments.damping if self.recipe.damping == "auto" else self.recipe.damping,
        )
        search = settings.searches_scale(node) and node.name not in known
        with run.clock("solve", node):
            rounding = (
                layer.learn(
                    recipe,
                    self._solver,
                    search_scale=search,
                    up_or_down=settings.levels == "up_or_down",
                    is_trial=run.is_trial,
                )
                if layer.moments.count
                else layer.nearest()
            )
            rounding = run.set_rounding(node, rounding)
        unweighed = self._columns.weights.forget(node)
        if run.shared is not None:
            run.shared.grids.setdefault(node.name, rounding.grid)
        notes = [] if layer.moments.count else ["no learning sample reached this layer"]
        if self._after is not None and layer.moments.count:
            rounding, further = self._after(node, layer, rounding)
            notes += further
        if not self._columns.is_paired(node):
            notes.append("learned from the quantized network's input alone: the network itself chooses its rows")
        elif self.recipe.column_weighting == "fisher" and unweighed is not None:
            notes.append(f"columns weighed alike: {unweighed}")
        _, coupled, _ = shape_of_coupled(*node.op.rows(node.weight).shape)
        if self.recipe.output_hessian and outputs is None and coupled > 1:
            no_derivative = "the network's output has no finite derivative by this layer's output"
            notes.append(f"rows apart: {f'more than {MOST_ROWS}' if coupled > MOST_ROWS else no_derivative}")
        if search and not layer.can_search_scale:
            notes.append("scale kept: it runs along the input channels")
        if self.recipe.correct_bias and node.bias == "fixed":
            notes.append("bias kept: the call's bias cannot be written")
        if node.float_bias:
            notes.append(f"bias in float: {node.float_bias}")
        return _Decided(rounding, notes, moments.count, run.layer_seconds[node.name], run.report.blocks[blocks:])


def _fitting(ready: list[WeightedNode], coupled: Collection[str]) -> list[WeightedNode]:
    """As many of the ready nodes as have moments that fit in memory together; at least one.

    Args:
        ready: what to choose from, in order.
        coupled: the names of those whose rows or groups are to make up for each other.
    """
    taken: list[WeightedNode] = []
    used = 0
    for node in ready:
        used += LayerMoments.bytes(node, node.name in coupled)
        if taken and used > _MOMENT_BYTES:
            break
        taken.append(node)
    return taken
