"""Graphs that write through views, made free of writes: the same values, whatever the order of writes and reads."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.transforms import functionalize, inline

# what may be a view, and what writes, for values of any shape
VIEWS = {
    "transpose": (0, -1),
    "flatten": (),
    "reshape": (-1,),
    "unsqueeze": (0,),
    "contiguous": (),
    "detach": (),
    "narrow": (-1, 0, 1),
    "select": (-1, -1),
    "chunk": (2, -1),
    "getitem": ((..., slice(1, None)),),
    "to": (torch.float64,),
}
WRITES = {"mul_": (2.0,), "add_": (1.0,), "sigmoid_": (), "setitem": (0, 3.0), "imul": (0.5,)}
FUNCTIONS = {"getitem": operator.getitem, "setitem": operator.setitem, "imul": operator.imul}
steps = st.tuples(st.sampled_from([*VIEWS, *VIEWS, *WRITES, "read"]), st.integers(0, 100))


def written(moves: list[tuple[str, int]]) -> fx.GraphModule:
    """A graph that does this to values that are there, and returns all of them and what was read."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    values, reads = [x, graph.call_method("mul", (x, 1.5))], []
    for name, number in moves:
        value = values[number % len(values)]
        if name == "read":
            reads.append(graph.call_method("sum", (value,)))
            continue
        arguments = (value, *(VIEWS.get(name) or WRITES.get(name, ())))
        if name in FUNCTIONS:
            made = graph.call_function(FUNCTIONS[name], arguments)
        else:
            made = graph.call_method(name, arguments)
        if name == "chunk":
            made = graph.call_function(operator.getitem, (made, 0))
        if name in VIEWS or (number % 2 and name != "setitem"):
            values.append(made)
    graph.output((values, reads))
    return fx.GraphModule(nn.Module(), graph)


def run(module: fx.GraphModule, x: Tensor) -> Any:
    with torch.no_grad():
        return fx.Interpreter(module).run(x)


@settings(max_examples=300, deadline=None)
@given(moves=st.lists(steps, min_size=1, max_size=12))
def test_values_are_those_of_the_graph_that_writes(moves):
    module = written(moves)
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    try:
        values, reads = run(module, x.clone())
    except (RuntimeError, IndexError):
        return  # nothing left to select
    pure = functionalize(inline(module, lambda _: False))
    before = x.clone()
    found, found_reads = run(pure, x)
    assert torch.equal(x, before)
    for one, other in zip([*found, *found_reads], [*values, *reads], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        assert one.stride() == other.stride()


def test_there_are_derivatives_by_what_is_written_through_one_of_several_views():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_method("mul", (x, 2.0))
    part = graph.call_function(operator.getitem, (graph.call_method("chunk", (y, 2, 1)), 1))
    graph.call_method("sigmoid_", (part,))
    graph.output(graph.call_method("square", (y,)))
    pure = functionalize(inline(fx.GraphModule(nn.Module(), graph), lambda _: False))
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: fx.Interpreter(pure).run(value), (x,))


def test_what_nothing_reads_is_not_made():
    graph = fx.Graph()
    x = graph.placeholder("x")
    flat = graph.call_method("flatten", (x,))
    graph.call_method("mul_", (flat, 2.0))
    graph.output(graph.call_method("sum", (flat,)))
    pure = functionalize(inline(fx.GraphModule(nn.Module(), graph), lambda _: False))
    assert [node.name for node in pure.graph.nodes if "write_through" in node.name] == []


@pytest.mark.parametrize("of_view", [False, True])
def test_a_change_of_shape_in_place_is_refused_where_there_are_views(of_view):
    graph = fx.Graph()
    x = graph.placeholder("x")
    flat = graph.call_method("flatten", (x,))
    graph.call_method("unsqueeze_", (flat if of_view else x, 0))
    graph.output((x, flat))
    with pytest.raises(InvalidModelError, match=r"node 'unsqueeze_'.*shape of.*views.*out of place"):
        functionalize(inline(fx.GraphModule(nn.Module(), graph), lambda _: False))
