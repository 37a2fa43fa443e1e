"""The float and the quantized stream, advanced together through their graphs, stage by stage over all batches.

A *stage* runs, for every batch, the nodes that depend on no undecided weight, and ends at the weighted nodes whose
inputs are then known. Only values that later nodes still need are kept between stages; what follows cheaply from a
kept value (`dequantize`, parameters) is made again when asked for, so that the quantized stream is kept in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from adaround_plugin.errors import InvalidModelError
from adaround_plugin.graph.compat import operator_name, tree_flatten, tree_map

__all__ = ["BothValues", "Stream", "Values", "tensors", "unpacks"]

Values = MutableMapping[fx.Node, Any]
# of the float and of the quantized stream, for one batch
BothValues = tuple[Values, Values]

T = TypeVar("T")


class Stream(fx.Interpreter):
    """One graph, run piecewise.

    Args:
        module: has the modules and parameters that the nodes name; they may be others than the graph's own.
        graph: whose nodes run.

    Attributes:
        done: the nodes that have run for every batch.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.nodes = list(graph.nodes)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.output_node = self.nodes[-1]
        # made again at each use: what depends on no input, and the unpacking of quantized values
        self._varying: set[fx.Node] = set(self.placeholders)
        self._remade: set[fx.Node] = set()
        # for each node, the kept nodes from which its value can be made again
        self._roots: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.nodes:
            if not self._varying.isdisjoint(node.all_input_nodes):
                self._varying.add(node)
            if node.op not in ("placeholder", "output") and (node not in self._varying or unpacks(node)):
                self._remade.add(node)
            of_inputs = (self._roots[source] for source in node.all_input_nodes)
            self._roots[node] = frozenset[fx.Node]().union(*of_inputs) if node in self._remade else frozenset([node])
        self._opaque = {node for node in self.nodes if _is_opaque(module, node)}
        self._replaced: dict[fx.Node, tuple[Any, ...]] = {}
        self.done: set[fx.Node] = set(self.placeholders)
        self._kept: set[fx.Node] = set()
        self._facts: dict[Callable[[Stream], Any], Any] = {}

    def once(self, find: Callable[[Stream], T]) -> T:
        """What a function finds in the stream's graph, which stays as it is: looked for when first asked for."""
        if find not in self._facts:
            self._facts[find] = find(self)
        found: T = self._facts[find]
        return found

    def keep(self, nodes: Iterable[fx.Node]) -> None:
        """Let the values of these nodes be needed to the end."""
        self._kept.update(root for node in nodes for root in self._roots[node])

    def arguments(self, node: fx.Node) -> tuple[Any, ...]:
        """The positional arguments of a node in this stream."""
        return self._replaced.get(node, node.args)

    def replace_arguments(self, node: fx.Node, arguments: tuple[Any, ...]) -> None:
        """Run a node on other constants, in this stream alone; the nodes among its arguments must stay."""
        self._replaced[node] = arguments

    def is_remade(self, node: fx.Node) -> bool:
        """Whether a node depends on no input, or only unpacks a quantized value: it is run again at each use."""
        return node in self._remade

    def varies(self, node: fx.Node) -> bool:
        """Whether a node depends on an input."""
        return node in self._varying

    def bind(self, arguments: Iterable[Any]) -> Values:
        """The values of one batch before anything has run."""
        return dict(zip(self.placeholders, arguments, strict=True))

    def runnable(self, blocked: set[fx.Node]) -> list[fx.Node]:
        """Nodes not yet done that depend on none of `blocked`, in order; the output node never runs."""
        known = set(self.done)
        found = []
        for node in self.nodes[:-1]:
            if node in known or node in blocked:
                continue
            if all(source in known for source in node.all_input_nodes):
                known.add(node)
                if node not in self._remade:
                    found.append(node)
        return found

    def reaches(self, node: fx.Node, run: Iterable[fx.Node]) -> bool:
        """Whether the inputs of `node` are known once the nodes `run` have run."""
        known = self.done.union(run)
        return all(known.issuperset(self._roots[source]) for source in node.all_input_nodes)

    def sources(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes whose values are kept, or were, and from which the inputs of these are known."""
        return {root for node in nodes for source in node.all_input_nodes for root in self._roots[source]}

    def run_nodes(self, values: Values, nodes: Iterable[fx.Node]) -> None:
        """Run `nodes` for one batch; results go into `values`."""
        for node in nodes:
            values[node] = self._execute(node, values, {})

    def value(self, node: Any, values: Values) -> Any:
        """The value of a node (or of a structure of nodes) whose inputs are known."""
        return self._value(node, values, {})

    def _value(self, node: Any, values: Values, remade: Values) -> Any:
        def look_up(one: fx.Node) -> Any:
            if one in values:
                return values[one]
            if one not in remade:
                remade[one] = self._execute(one, values, remade)
            return remade[one]

        return map_arg(node, look_up)

    def _execute(self, node: fx.Node, values: Values, remade: Values) -> Any:
        arguments = self._value((self.arguments(node), node.kwargs), values, remade)
        return self.apply(node, *arguments)

    def apply(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a node makes of values for its arguments; an error tells which node it was."""
        try:
            if node in self._opaque:
                return self._run_opaque(node, args, kwargs)
            return getattr(self, node.op)(node.target, args, kwargs)
        except Exception as error:
            error.add_note(f"while running node {node.name} ({node.op} {node.target})")
            raise

    def outputs(
        self,
        arguments: Iterable[Any],
        ends: Iterable[fx.Node],
        visit: Callable[[fx.Node, Values], None] | None = None,
    ) -> list[Any]:
        """The values of some nodes for one batch, run from its inputs; each value is freed after its last use.

        Nothing of the stream may have run.

        Args:
            arguments: values of the graph's inputs.
            ends: the nodes whose values are returned.
            visit: called with each node before it runs, and with the values that are known then.
        """
        ends, values, nodes = list(ends), self.bind(arguments), self.runnable(set())
        last = {root: node for node in nodes for source in node.all_input_nodes for root in self._roots[source]}
        needed = {root for end in ends for root in self._roots[end]}
        dead: dict[fx.Node, list[fx.Node]] = {}
        for root, node in last.items():
            if root not in needed:
                dead.setdefault(node, []).append(root)
        for node in nodes:
            if visit is not None:
                visit(node, values)
            self.run_nodes(values, [node])
            if node not in last and node not in needed:
                del values[node]
            for root in dead.get(node, ()):
                del values[root]
        return [self.value(end, values) for end in ends]

    def _run_opaque(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What code that nobody traced makes of copies: of what it writes into them, no other node would know.

        Raises:
            InvalidModelError: it writes into them.
        """
        copies = tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, (args, kwargs))
        result = getattr(self, node.op)(node.target, *copies)
        for one in tree_flatten(copies)[0]:
            # autograd counts what is written into a tensor, but for those of inference mode
            if isinstance(one, torch.Tensor) and not one.is_inference() and one._version:
                raise InvalidModelError(
                    f"node {node.name!r}", "writes into its input, and is not traced", "Let it write into a copy."
                )
        return result

    def finish(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Mark `nodes` as done for every batch; returns the nodes whose values are still needed."""
        self.done.update(nodes)
        waiting = [node for node in self.nodes if node not in self.done and node not in self._remade]
        return self._kept | self.sources(waiting)


def _is_opaque(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls a module or a function of somebody else than torch, whose code is not in the graph."""
    if node.op == "call_module":
        home = type(module.get_submodule(str(node.target))).__module__
    elif node.op == "call_function" and isinstance(node.target, FunctionType):
        home = node.target.__module__
    else:
        return False
    return home.partition(".")[0] not in ("torch", "torchao", "torchvision", "adaround_plugin")


def unpacks(node: fx.Node) -> bool:
    """Whether a node turns integers into floats."""
    if node.op == "call_function":
        return operator_name(node)[0].startswith("dequantize")
    return node.op == "call_method" and node.target == "dequantize"


def tensors(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors in a nested output, complex ones as pairs of real numbers."""
    if isinstance(value, torch.Tensor):
        value = value.dequantize() if value.is_quantized else value
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return [value.float()] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return []
