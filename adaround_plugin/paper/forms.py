"""One layer of a prepared model, and the two rounding problems that section 3 of the AdaRound paper poses for it.

Both are on the grid of the host's observer and in the paper's search space, so that one solver answers both, and
`write_integers` puts either answer into the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.backend_config import BackendConfig

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.graph.arguments import input_of
from adaround_plugin.graph.streams import Stream
from adaround_plugin.hosts.base import Host, WeightedNode
from adaround_plugin.hosts.open import open_host
from adaround_plugin.options import check_number
from adaround_plugin.paper.task_loss import Loss, TaskLoss, expand_task_loss
from adaround_plugin.paper.weights import named_node
from adaround_plugin.regions.binding import bind_batches
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.rounding.hessian import Hessian
from adaround_plugin.rounding.moments import Moments
from adaround_plugin.rounding.problem import Rounding, RoundingProblem
from adaround_plugin.rounding.qubo import up_or_down_problem

__all__ = ["LayerForms"]


@dataclass(frozen=True)
class LayerForms:
    """A layer of a prepared model.

    Attributes:
        host: the model's host.
        node: the weighted node, with the operator, the float weight and the grid.
        model: the float model as the host sees it: called as the prepared model is, batch norms folded, no observers.
        parameter: name of the weight in `model`.
    """

    host: Host
    node: WeightedNode
    model: fx.GraphModule
    parameter: str

    @classmethod
    def of(cls, prepared: nn.Module, name: str, backend_config: BackendConfig | None = None) -> LayerForms:
        """The layer of that name in a calibrated model from `prepare_fx` or `prepare_pt2e`.

        Raises:
            InvalidOptionError: the host quantizes no layer of that name, or its weight is no parameter of the model.
            InvalidModelError: the model is not ready, see `adaround`.
        """
        host = open_host(prepared, backend_config)
        node = named_node(host, name)
        parameters = host.prepared.named_parameters()
        own = (own for own, values in parameters if values.data_ptr() == node.weight.data_ptr())
        if (parameter := next(own, None)) is None:
            raise InvalidOptionError(
                "name",
                f"the weight of {name!r} is no parameter of the model, but computed or a buffer",
                "Take out its parametrization, or make it a parameter, and prepare the model again.",
            )
        return cls(host, node, _without_observers(host.copy()), parameter)

    def local(
        self,
        batches: Iterable[Any],
        inputs: Callable[[Any], Any] | None = None,
        *,
        damping: float = 0.01,
        max_columns: int = 16384,
    ) -> RoundingProblem:
        """The local form (equations 14 to 20): squared error of the layer's own output on its float input.

        The summed loss of the rows is the mean squared change of one output position, over its channels summed.

        Args:
            batches, inputs: calibration data, as for `adaround`.
            damping: ridge on `E[x x^T]` relative to its mean diagonal.
            max_columns: about how many columns of the design matrix enter, as for `adaround`.

        Raises:
            InvalidBatchError: no batches, or one that does not fit the model.
            InvalidOptionError: the damping is not positive.
        """
        check_number("damping", damping, above=0)
        host = self.host
        bound = bind_batches(host.prepared, host.signature, host.flatten, batches, inputs, argument="batches")
        op, weight = self.node.op, self.node.weight
        second = self._second_moment(bound, Sampling.of(bound, 0, max_columns, 0))
        hessian = Hessian.damped(second, damping)
        return up_or_down_problem(self.node.grid, weight, op.rows, hessian, op.rows(weight).double())

    def expand(self, loss: Loss, batches: Iterable[Any], *, chunk: int = 1) -> TaskLoss:
        """The task loss to second order in this layer's weight; arguments and errors of `expand_task_loss`."""
        return expand_task_loss(self.model, self.parameter, loss, batches, chunk=chunk)

    def task_loss(
        self,
        loss: Loss,
        batches: Iterable[Any],
        *,
        gradient: bool = False,
        damping: float = 0.01,
        chunk: int = 1,
    ) -> RoundingProblem:
        """The task-loss form (equation 13), one row of all weights; arguments and errors of `expand_task_loss` and
        `TaskLoss.problem`."""
        return self.expand(loss, batches, chunk=chunk).problem(self.node.grid, gradient=gradient, damping=damping)

    def integers(self, rounding: Rounding) -> Tensor:
        """The answer to either form in the weight's own shape, int64, for `write_integers`."""
        shape, found = self.node.weight.shape, rounding.integers
        if found.shape == self.node.op.rows(self.node.weight).shape:
            return self.node.op.unrows(found, shape).contiguous()
        return found.reshape(shape)

    def _second_moment(self, bound: Sequence[list[Any]], sampling: Sampling) -> Tensor:
        """`E[x x^T]` over the layer's columns in the float model: `(G, D, D)` float64."""
        node, stream = self.node, Stream(self.host.float_graph, self.host.float_graph.graph)
        groups, _, columns = node.op.rows(node.weight).shape
        moments = Moments(groups, 1, columns, node.weight.device)
        with torch.no_grad():
            for i, arguments in enumerate(bound):
                values = stream.bind(arguments)
                stream.run_nodes(values, stream.runnable(set()))
                for site in node.sites:
                    called = site.float_node
                    x = stream.value(input_of(called), values)
                    patches = node.op.patches(x, node.weight.shape)
                    picked = patches.columns(*sampling.columns(i, patches, len(node.sites)))
                    ones = picked.new_ones(picked.shape[:2])
                    moments.add(picked, torch.zeros_like(ones).unsqueeze(2), ones)
        return moments.finish().terms(centred=False)[0]


def _without_observers(model: fx.GraphModule) -> fx.GraphModule:
    """Put an identity in the place of every observer, of whichever toolkit, in place."""
    # children first, or they are gone; an observer may have several names
    for name, module in reversed(list(model.named_modules(remove_duplicate=False))):
        if callable(getattr(module, "calculate_qparams", None)):
            model.set_submodule(name, nn.Identity())
    return model
