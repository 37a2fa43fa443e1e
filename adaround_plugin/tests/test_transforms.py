"""Modules of a graph once more: what is set in these, the others do not see; tensors are in common."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from adaround_plugin.graph.transforms import inline, separate


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        # neither a parameter nor a buffer
        self.plain = torch.ones(3, 1, 1)
        self.settings = {"gain": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.plain * self.settings["gain"]


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Part(), nn.ReLU())
        self.again = self.inner[0].conv
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))
        self.register_buffer("offset", torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) + self.again(x)
        return torch.conv2d(y, self.weight) + self.offset


X = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def traced() -> fx.GraphModule:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Part) or super().is_leaf_module(m, module_qualified_name)

    torch.manual_seed(0)
    whole = Whole().eval()
    graph = Tracer().trace(whole)
    # the second name of a module, which tracing does not use
    (called,) = graph.find_nodes(op="call_module", target="inner.0.conv")
    called.target = "again"
    module = fx.GraphModule(whole, graph).eval()
    module.unused = nn.Linear(3, 3)
    return module


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by each of their names."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def part(module: nn.Module) -> Part:
    found = module.get_submodule("inner.0")
    assert isinstance(found, Part)
    return found


def run(module: nn.Module, graph: fx.Graph) -> Tensor:
    with torch.no_grad():
        return fx.Interpreter(module, graph=graph).run(X)


def test_the_graph_runs_on_either(traced):
    apart = separate(traced)
    assert not apart.training
    assert torch.equal(run(apart, traced.graph), traced(X))


def test_every_tensor_is_the_same_object_and_every_module_another(traced):
    apart = separate(traced)
    names = [name for name in named_tensors(traced) if not name.startswith("unused")]
    assert {"weight", "offset", "again.weight", "inner.0.conv.weight", "inner.0.norm.running_mean"} <= set(names)
    for name in [*names, "inner.0.plain"]:
        path, _, leaf = name.rpartition(".")
        assert getattr(apart.get_submodule(path), leaf) is getattr(traced.get_submodule(path), leaf), name
    own, others = set(map(id, apart.modules())), set(map(id, traced.modules()))
    assert not own & others


@pytest.mark.parametrize("shared", [False, True])
def test_a_graph_written_out_has_modules_of_its_own_unless_they_may_be_shared(shared, traced):
    flat = inline(traced, lambda module: False, shared=shared)
    assert torch.equal(flat(X), traced(X))
    assert (part(flat) is part(traced)) == shared
    assert part(flat).conv.weight is part(traced).conv.weight


def test_only_what_the_graph_names_is_there(traced):
    assert hasattr(traced, "unused")
    assert not hasattr(separate(traced), "unused")


def test_a_module_of_two_names_is_one_module(traced):
    apart = separate(traced)
    assert apart.again is part(apart).conv


def test_what_is_set_in_one_the_other_does_not_see(traced):
    expected = traced(X).detach()
    apart = separate(traced)
    apart.weight = nn.Parameter(torch.zeros_like(apart.weight))
    apart.offset = torch.full_like(apart.offset, 7.0)
    part(apart).conv.weight = nn.Parameter(torch.zeros_like(part(apart).conv.weight))
    part(apart).settings["gain"] = 0.0
    part(apart).norm.running_mean = torch.full((3,), 9.0)
    handle = apart.again.register_forward_hook(lambda module, args, output: 3 * output)
    assert torch.equal(traced(X), expected)
    assert (run(apart, traced.graph) == 7.0).all()
    handle.remove()
    # and the other way round
    again = separate(traced)
    part(traced).settings["gain"] = 0.0
    traced.weight = nn.Parameter(torch.zeros_like(traced.weight))
    assert torch.equal(run(again, traced.graph), expected)


def test_modules_apart_are_apart_from_one_another(traced):
    expected = traced(X).detach()
    one, other = separate(traced), separate(traced)
    part(one).norm.weight = nn.Parameter(torch.zeros(3))
    assert torch.equal(run(other, traced.graph), expected)
    assert not torch.equal(run(one, traced.graph), expected)


def test_other_parameters_for_the_time_of_a_call_are_seen_by_none_of_the_others(traced):
    apart, expected = separate(traced), traced(X).detach()
    seen: list[Tensor] = []
    apart.again.register_forward_hook(lambda module, args, output: seen.append(traced(X).detach()))
    functional_call(apart.again, {"weight": torch.zeros_like(apart.again.weight)}, (X,))
    assert torch.equal(seen[0], expected)


def test_training_is_as_it_was(traced):
    traced = copy.deepcopy(traced)
    part(traced).norm.train()
    apart = separate(traced)
    assert part(apart).norm.training
    assert not part(apart).conv.training


def test_a_graph_of_no_modules_has_none():
    empty = separate(fx.symbolic_trace(lambda x: x + 1))
    assert not list(empty.children())
    assert not list(empty.parameters())
