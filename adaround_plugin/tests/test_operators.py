"""Linear layers of batches that do not lie in one piece: one product, not one for each sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaround_plugin.graph.calls import function_call, module_call
from adaround_plugin.graph.operators import is_linear


class Products(TorchDispatchMode):
    """Counts products of batches of matrices."""

    of_batches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of_batches += func is torch.ops.aten.bmm.default
        return func(*args, **(kwargs or {}))


class ByModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1))


class ByFunction(ByModule):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.transpose(0, 1), self.layer.weight, bias=self.layer.bias)


class ByKeyword(ByModule):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x.transpose(0, 1))


FORMS = [ByModule, ByFunction, ByKeyword]


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_by_the_output_take_one_product(form):
    net, x = form().requires_grad_(False), torch.randn(7, 4, 5, requires_grad=True)
    graph = fx.symbolic_trace(net).graph
    node = next(node for node in graph.nodes if node.target in ("layer", F.linear))
    call = function_call(node, net.layer.bias) if node.op == "call_function" else module_call(net.layer)
    args, kwargs = ((), {"input": x.transpose(0, 1)}) if form is ByKeyword else ((x.transpose(0, 1),), {})
    with Products() as plain:
        expected = net(x)
    assert plain.of_batches  # or torch has changed, and nobody has to care any more
    with Products() as seen:
        found = call.tapped(args, kwargs, net.layer.weight, lambda output: 2 * output)
        (gradient,) = torch.autograd.grad(found.sum(), x)
    assert not seen.of_batches
    torch.testing.assert_close(found, 2 * expected)
    torch.testing.assert_close(gradient, (2 * net.layer.weight.sum(0)).expand_as(x))


def test_what_is_a_linear_layer():
    assert is_linear(F.linear)
    assert is_linear(torch.ops.aten.linear.default)
    assert is_linear(nn.Linear(2, 2))
    assert is_linear(torch.ao.nn.intrinsic.LinearReLU(nn.Linear(2, 2), nn.ReLU()))
    assert not any(map(is_linear, (F.conv2d, nn.Conv2d(1, 1, 1), "linear", None)))
