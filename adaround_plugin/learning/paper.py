"""The paper's own method: each layer's rounding relaxed on samples (equations 21 to 25)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.base import Host, WeightedNode
from adaround_plugin.learning.layer import Layer
from adaround_plugin.learning.layerwise import LayerWise, PendingLayers
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.region_step import RegionStep
from adaround_plugin.options import check_bool, check_integer, check_number, check_solver, named
from adaround_plugin.regions.blocks import layer_exits
from adaround_plugin.regions.learnable import Outcome, WeightInit
from adaround_plugin.regions.reconstruction import reconstruct
from adaround_plugin.regions.region import Drawing, Region
from adaround_plugin.rounding.problem import Solver
from adaround_plugin.rounding.result import LayerRounding
from adaround_plugin.rounding.soft_rounding import RectifiedSigmoid, SoftRounding
from adaround_plugin.solvers import Nearest
from adaround_plugin.solvers.relaxation import Schedule, check_exponents, check_soft_rounding

__all__ = ["Paper"]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """AdaRound as published (Nagel et al. 2020, arXiv 2004.10568), through the host's own operators.

    Layer after layer `|| f_a(W x) - f_a(W~ x^) ||^2 + lambda f_reg(V)` (equation 25) is minimized by Adam on
    minibatches: floor or ceil on the observer's scale, biases as they are, all samples to learn from. The defaults are
    the paper's settings; the names are its own, and AIMET's where it has none.

    lambda means the same for every layer: the error is divided by that of the rounding from which the layer starts, and
    `f_reg` is the mean over the weights. The paper has lambda = 0.01 with a squared error and a sum over weights whose
    scales it does not give.

    Attributes:
        iterations: steps of Adam for each layer; fewer if every weight has settled at 0 or 1 before.
        batch_size: samples in a minibatch; a program exported for one batch size has that.
        learning_rate: of Adam, for `V`; the paper keeps Adam's default.
        regularization: lambda.
        warm_start: share of the iterations without `f_reg`.
        beta: first and last exponent of `f_reg`.
        asymmetric: take the quantized network's input of the layer for `x^`, else the float network's (equation 21).
        activation: whether the loss is taken after the activation function that follows the layer.
        variant: how a share depends on `V`: the paper's rectified sigmoid, or one of the classes in
            `adaround_plugin.paper.variants`, with which the paper compares it.
        start: None, so that `h(V)` starts at the fraction of `W / s`; or a solver whose integers are the start: a
            weight may then move one step from them, to the side to which the loss falls.
        correct_bias: let biases absorb the mean error.
        search_scale: choose scale and zero point under the layer's data, else keep the observer's.
        holdout: share of the samples kept out of learning; what is worse there than its start is not taken.
        max_columns: as in `LayerWise`, for the errors in the report.

    Raises:
        InvalidOptionError: an option is out of range.
    """

    iterations: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    regularization: float = 1.0
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    asymmetric: bool = True
    activation: bool = True
    variant: type[SoftRounding] = RectifiedSigmoid
    start: Solver | None = None
    correct_bias: bool = False
    search_scale: bool = False
    holdout: float = 0.0
    max_columns: int = 16384

    def __post_init__(self) -> None:
        check_integer(*named(self, "batch_size"), least=1)
        check_number(*named(self, "warm_start"), least=0, below=1)
        for name in ("asymmetric", "activation", "correct_bias", "search_scale"):
            check_bool(*named(self, name))
        check_integer(*named(self, "iterations"), least=1)
        check_number(*named(self, "learning_rate"), above=0)
        check_number(*named(self, "regularization"), least=0)
        check_exponents(*named(self, "beta"))
        check_soft_rounding(*named(self, "variant"))
        if self.start is not None:
            check_solver(*named(self, "start"))
        check_number(*named(self, "holdout"), least=0, most=0.5)
        check_integer(*named(self, "max_columns"), least=1)

    @property
    def layers(self) -> LayerWise:
        """How each layer is decided before it is relaxed: rounded to nearest, or by the solver to start from."""
        return LayerWise(
            solver=Nearest() if self.start is None else self.start,
            search_scale=self.search_scale,
            propagate_error=self.asymmetric,
            correct_bias=self.correct_bias,
            column_weighting="none",
            damping=0.01,
            output_hessian=False,
            levels="up_or_down",
            holdout=self.holdout,
            max_columns=self.max_columns,
        )

    @property
    def is_baseline(self) -> bool:
        """Never: layers are relaxed."""
        return False

    def check(self, host: Host) -> None:
        """Every network will do."""

    def with_layers(self, layers: LayerWise) -> Paper:
        """This method: its own fields decide its layers.

        Raises:
            InvalidOptionError: `layers` differ from them.
        """
        if layers != self.layers:
            raise InvalidOptionError("method", "Paper says itself how layers are decided", "Set the fields of Paper.")
        return self

    def learn(self, run: Pass) -> None:
        """Decide every layer of a pass, and relax each right after."""
        exits = layer_exits(run.host, run.host.nodes, self.activation)
        schedule = Schedule(
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            regularization=self.regularization,
            warm_up=self.warm_start,
            beta=self.beta,
            soft_rounding=self.variant,
        )

        def learn(region: Region, inits: list[WeightInit], report: Callable[[int, float], None]) -> Outcome:
            from_weight = self.start is None
            return reconstruct(region, inits, schedule, from_weight=from_weight, seed=run.seed, report=report)

        def relax(node: WeightedNode, layer: Layer, rounding: LayerRounding) -> tuple[LayerRounding, list[str]]:
            step = RegionStep(
                run=run,
                layers=self.layers,
                name=node.name,
                nodes=(node,),
                exits=exits[node.name],
                drawing=Drawing(self.batch_size),
                phase="reconstruct",
                learns_scale=False,
                propagate_error=self.asymmetric,
            )
            report = step.learn(learn)
            run.report.blocks.append(report)
            decided = run.roundings[node.name]
            if decided is not rounding:
                rounding = replace(
                    layer.rounded(decided.grid, decided.integers, decided.bias_correction), learned=decided.learned
                )
            return rounding, [report.note] if report.note else []

        PendingLayers(run, self.layers, relax).decide_all()
