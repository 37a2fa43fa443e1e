"""How much each entry of a region's output matters to the network's output: the diagonal of BRECQ's metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaround_plugin.graph.paths import Path, run_node
from adaround_plugin.graph.streams import Stream, Values, tensors

__all__ = ["importance"]


def importance(
    stream: Stream, nodes: Sequence[fx.Node], at: Sequence[Tensor], values: Values, projections: int, seed: int
) -> list[Tensor]:
    """Mean squared derivative of random projections of the network's output by every entry of some nodes' values.

    BRECQ (Li et al. 2021, equation 10) weighs the error of a block's output by the diagonal of the Fisher information,
    for a loss with labels. Without labels the network's own output is kept: its squared error has the Hessian
    `2 J^T J`, and `E (J^T v)^2` over standard normal `v` is the diagonal of `J^T J`.

    Args:
        stream: the float stream.
        nodes: where.
        at: their values for one batch.
        values: what the stream keeps of the batch.
        projections: how many.
        seed: of the projections.

    Returns:
        For each node a tensor of the shape of its value: what reaches the output by no other of the nodes counts; ones
        where no output has a derivative.
    """
    ends: list[fx.Node] = []
    map_arg(stream.output_node.args[0], ends.append)
    path = Path(stream, ends, {*values, *nodes}, {})
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in at]
        found: dict[fx.Node, Any] = {node: stream.value(node, values) for node in path.entries if node not in nodes}
        found.update(zip(nodes, leaves, strict=True))
        for node in path.order:
            found[node] = run_node(stream, node, found)
        outputs = tensors(map_arg(stream.output_node.args[0], found.__getitem__))
        outputs = [output for output in outputs if output.requires_grad]
        if not outputs:
            return [torch.ones_like(leaf) for leaf in leaves]
        total = [torch.zeros_like(leaf) for leaf in leaves]
        for _ in range(projections):
            draws = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
            value = torch.stack([(output * draw).sum() for output, draw in zip(outputs, draws, strict=True)]).sum()
            gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            for one, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    one += gradient.square() / projections
    return total
