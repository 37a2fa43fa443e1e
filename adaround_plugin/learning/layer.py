"""One layer, from its moments to a rounding: target, problem, scale, solution, and the check on held-out samples.

No graph and no host: a layer is an operator, a weight, a grid and moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from adaround_plugin.learning.coupling import solve_across_groups, solve_within_groups
from adaround_plugin.learning.division import solve_divided
from adaround_plugin.learning.scale_search import SearchedRows, refit_group_scale, refit_scale, search_grid
from adaround_plugin.processes import ALONE, Processes
from adaround_plugin.rounding.across import JoinedMoments
from adaround_plugin.rounding.grid import Grid
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.linear_op import LinearOp
from adaround_plugin.rounding.moments import HeldOut, Moments
from adaround_plugin.rounding.problem import RoundingProblem, Solver, solved
from adaround_plugin.rounding.result import LayerRounding
from adaround_plugin.rounding.schemes import up_or_down as floor_and_next
from adaround_plugin.solvers import Annealing, Nearest
from adaround_plugin.solvers.gptq import round_in_order

__all__ = ["Layer", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What a layer is asked to imitate, and how its data are weighed.

    Attributes:
        propagate_error: imitate the float output from the *quantized* input, so that the layer makes up for the errors
            of those before it (equation 25 without its activation function; the paper calls it asymmetric
            reconstruction). Else only undo the weight's own error.
        correct_bias: let the bias absorb the mean error, where the layer's bias can be written.
        column_weighting: `"none"`; `"inverse_norm"` to weigh each column by `1 / |x|^2`, so that a few columns with
            massive activations do not decide for all; or `"fisher"` to weigh it by the squared derivative of the
            network's output by the layer's output there.
        damping: ridge on the hessian, relative to the mean of its diagonal; `"auto"` for what the samples ask for,
            which is to be known when a layer is learned.
        output_hessian: let the rows of a layer, or its groups of one row, make up for each other, as the derivatives of
            the network's output by the layer's outputs say.
    """

    propagate_error: bool = True
    correct_bias: bool = True
    column_weighting: Literal["none", "inverse_norm", "fisher"] = "none"
    damping: float | Literal["auto"] = 0.01
    output_hessian: bool = False

    @property
    def ridge(self) -> float:
        """The damping, which is known by now."""
        assert self.damping != "auto"
        return self.damping

    def __str__(self) -> str:
        damping = self.damping if self.damping == "auto" else f"{self.damping:g}"
        return (
            f"errors {'propagated' if self.propagate_error else 'not propagated'}, "
            f"bias {'corrected' if self.correct_bias else 'kept'}, "
            f"column weighting {self.column_weighting}, damping {damping}"
            f"{', output hessian' if self.output_hessian else ''}"
        )


@dataclass(frozen=True)
class Layer:
    """A weighted operator with the data it has seen.

    Attributes:
        op: what the operator does to its weight.
        weight: the float weight.
        grid: the grid to start from.
        moments: of the learning samples, finished.
        holdout: the columns of the held-out samples, finished; its count may be 0.
        outputs: `(G, R, R)`, the second moment of the derivatives of the network's output by the layer's, over its mean
            diagonal and damped, where it is known and `R` is more than 1; or as `across` has its groups.
        across: of groups of one row put together, if they are to make up for each other (`rounding.across`), finished.
        processes: that learn the same layer from the same moments; each solves some of its rows.
    """

    op: LinearOp
    weight: Tensor
    grid: Grid
    moments: Moments
    holdout: HeldOut
    outputs: Tensor | None = None
    across: JoinedMoments | None = None
    processes: Processes = ALONE

    def nearest(self) -> LayerRounding:
        """Round to nearest on the starting grid, bias untouched: the baseline."""
        integers = self.grid.nearest(self.weight)
        error, held = self._errors(self.grid, integers, None)
        return LayerRounding(
            self.grid,
            integers,
            nearest_error=error,
            learned_error=error,
            nearest_holdout=held,
            learned_holdout=held,
        )

    def rounded(self, grid: Grid, integers: Tensor, bias_correction: Tensor | None) -> LayerRounding:
        """A rounding that was found elsewhere, with its errors beside those of nearest."""
        baseline = self.nearest()
        error, held = self._errors(grid, integers, bias_correction)
        return LayerRounding(
            grid,
            integers,
            bias_correction,
            learned=True,
            nearest_error=baseline.nearest_error,
            learned_error=error,
            nearest_holdout=baseline.nearest_holdout,
            learned_holdout=held,
        )

    def learn(
        self,
        recipe: Recipe,
        solver: Solver,
        *,
        search_scale: bool,
        up_or_down: bool = False,
        is_trial: bool = False,
        is_judged: bool = True,
    ) -> LayerRounding:
        """Learn the rounding; nearest is kept where it is better on held-out samples.

        Args:
            recipe: what to imitate; `correct_bias` must be off if the bias cannot be written.
            solver: solves the rounding problem.
            search_scale: choose the scale under the hessian, else keep the grid's.
            up_or_down: restrict to floor and ceil of the weight on its grid, as the paper does.
            is_trial: learn quickly what a recipe leads to: by one pass of GPTQ, of fewer scales, not compared with
                nearest; errors are NaN.
            is_judged: compare with nearest, unless this is a trial; without, errors are NaN.

        Raises:
            InvalidOptionError: the solver's answer is none.
        """
        hessian, target = self._form(recipe)
        grid = self.grid
        if search_scale and self.can_search_scale:
            grid = self._search(hessian, target, up_or_down, is_trial)
        problem = self._problem(grid, hessian, target, up_or_down)

        def apart() -> Tensor:
            return solve_divided(self.processes, problem, lambda rows, _: solved(solver, rows))

        outputs = self.outputs if recipe.output_hessian else None
        within = outputs if self.across is None else None
        # annealing of coupled rows needs no more than a start, as a rule
        is_quick = is_trial or (within is not None and isinstance(solver, Annealing))
        found = round_in_order(problem)[0] if is_quick else apart()
        if within is not None:
            scale = self._steps(grid)[..., 0] if self._scale_follows_rows else None
            found = solve_within_groups(
                problem, within, scale, found, solver, self.processes, apart if is_quick else None
            )
        if search_scale and self.can_search_scale and not (up_or_down or is_trial or isinstance(solver, Nearest)):
            grid = self._refit(grid, hessian, target, found)
        if outputs is not None and self.across is not None:
            # of the weight itself, whose target is another one for channels together
            problem = self._problem(grid, hessian, self.op.rows(self.weight).double(), up_or_down)
            found = solve_across_groups(
                replace(problem, nearest=found),
                self.across,
                outputs,
                self._steps(grid),
                solver,
                self.processes,
                damping=recipe.ridge,
                propagate_error=recipe.propagate_error,
                correct_bias=recipe.correct_bias,
            )
        # solvers work column by column; the model wants rows
        integers = self.op.unrows(found, self.weight.shape).contiguous()
        correction = None
        if recipe.correct_bias:
            correction = self.op.outputs(self.moments.bias(self._change(grid, integers))).float()
        if is_trial or not is_judged:
            return LayerRounding(grid, integers, correction, learned=True)
        return self._judged(grid, integers, correction)

    def _judged(self, grid: Grid, integers: Tensor, correction: Tensor | None) -> LayerRounding:
        """The learned rounding, or nearest where that is better on held-out samples (on all without any)."""
        found = self.rounded(grid, integers, correction)
        if found.learned_holdout is not None and found.nearest_holdout is not None:
            learned = found.learned_holdout <= found.nearest_holdout
        else:
            learned = found.learned_error <= found.nearest_error
        if learned:
            return found
        nearest = self.grid.nearest(self.weight)
        return replace(found, grid=self.grid, integers=nearest, bias_correction=None, learned=False)

    def _form(self, recipe: Recipe) -> tuple[Hessian, Tensor]:
        """Damped hessian and target in weight units.

        Completing the square of `E (d + (w - w^) x^)^2` gives the target `t = w + E[d x^^T] (H + delta I)^-1`.
        """
        moments = self.moments
        second, cross, _ = moments.terms(centred=recipe.correct_bias)
        hessian = Hessian.damped(second, recipe.ridge, moments.power_of_columns.mean(1))
        target = self.op.rows(self.weight).double()
        if recipe.propagate_error:
            target = target + hessian.solve(cross)
        return hessian, target

    def _problem(self, grid: Grid, hessian: Hessian, target: Tensor, up_or_down: bool) -> RoundingProblem:
        """The rounding problem on `grid`, in its coordinates."""
        rows, shape = self.op.rows, self.weight.shape
        scale = self._steps(grid)
        zero_point = rows(grid.expand(grid.zero_point, shape))
        if up_or_down:
            lower, upper = map(rows, floor_and_next(grid, self.weight))
        else:
            lower, upper = (zero_point.new_tensor(end).expand(target.shape) for end in (grid.quant_min, grid.quant_max))
        return RoundingProblem(
            target=target / scale + zero_point,
            hessian=hessian,
            lower=lower,
            upper=upper,
            nearest=rows(grid.nearest(self.weight)),
            step=scale.new_ones(()) if self._scale_follows_rows else scale,
        )

    def _steps(self, grid: Grid) -> Tensor:
        """`(G, R, D)` float64: the size of the grid's step for each weight."""
        return self.op.rows(grid.expand(grid.scale, self.weight.shape)).double()

    @property
    def can_search_scale(self) -> bool:
        """Whether a scale can be judged by the rows that it serves: not where it runs along the columns of all."""
        return self._scale_follows_rows or self.grid.group_size is not None

    @property
    def _scale_follows_rows(self) -> bool:
        """Whether one scale serves a whole row."""
        return self.grid.group_size is None and self.grid.ch_axis in (None, self.op.output_axis)

    def _search(self, hessian: Hessian, target: Tensor, up_or_down: bool, is_trial: bool) -> Grid:
        """Choose the scale under the hessian: of each row, or of each group of its columns by the group's own share."""
        weight = self.op.rows(self.weight) if up_or_down else None
        rows = SearchedRows(target, hessian, self._channel(), weight)
        if self.grid.group_size is not None:
            rows = rows.in_runs(self.grid.group_size)
        rows = rows.divided(self.processes)
        return search_grid(self.grid, rows, 7, refine=False) if is_trial else search_grid(self.grid, rows)

    def _refit(self, grid: Grid, hessian: Hessian, target: Tensor, integers: Tensor) -> Grid:
        """The best scale for the integers as they are."""
        if grid.group_size is not None:
            return refit_group_scale(grid, hessian, target, integers)
        return refit_scale(grid, self._channel(), hessian, target, integers)

    def _channel(self) -> Tensor:
        """`(G, R)`: the grid's channel that each row belongs to."""
        index = torch.arange(self.grid.scale.numel(), device=self.weight.device)
        return self.op.rows(self.grid.expand(self.grid.per_channel(index), self.weight.shape))[..., 0]

    def _change(self, grid: Grid, integers: Tensor) -> Tensor:
        """`w - w^` as rows, float64."""
        return self.op.rows(self.weight.double() - grid.dequantize(integers).double())

    def _errors(self, grid: Grid, integers: Tensor, correction: Tensor | None) -> tuple[float, float | None]:
        """Output error over output variance on the learning and on the held-out samples."""
        change, rows = self._change(grid, integers), self.op.rows(self.weight).double()
        # the bias is learned on the learning samples; held-out ones must live with it
        offset = None if correction is None else correction.double().reshape(change.shape[:2])
        found: list[float | None] = []
        for seen in (self.moments, self.holdout):
            if not seen.count:
                found.append(None)
                continue
            error, (variance, square) = seen.error(change, offset).sum(), seen.power_of(rows)
            # an output that does not vary is measured against its mean square
            power = variance if variance > 1e-9 * square else square
            found.append(float(error / power) if power > 0 else float(error))
        return found[0] or 0.0, found[1]
