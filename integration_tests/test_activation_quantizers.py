"""Activations whose scale is learned: every quantize node of one observer is found, wherever it stands."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx

from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.fx.host import PreparedFX
from adaround_plugin.rounding.result import LayerRounding
from integration_tests.models import batches, prepared_model


class Net(nn.Module):
    """A concatenation that is quantized before and after a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dropout, self.head = nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(self.dropout(torch.cat([y, 2 * y], 1).relu()).mean((2, 3)))


def test_a_scale_reaches_the_quantize_node_behind_a_dropout() -> None:
    """Dropout passes its input on, and the host quantizes before and after it with one observer."""
    model = Net()
    data = batches(3, 8, 8)
    host = PreparedFX(prepared_model(model.eval(), data, activation_bits=4))
    _, stream = open_streams(host)
    scales = {}
    for node in host.nodes:
        node.set_quantized(stream.module, LayerRounding(node.grid, node.grid.nearest(node.weight)))
    for quantizer in host.quantizers:
        quantizer.set_scale(stream, 0.9 * quantizer.scale)
        scales |= dict.fromkeys(quantizer.names, 0.9 * quantizer.scale)
    written = host.copy()
    host.write(
        written, {node.name: LayerRounding(node.grid, node.grid.nearest(node.weight)) for node in host.nodes}, scales
    )
    converted = convert_to_reference_fx(copy.deepcopy(written))
    with torch.no_grad():
        values = stream.bind([data[0]])
        stream.run_nodes(values, stream.runnable(set()))
        assert torch.equal(stream.value(stream.output_node.args[0], values), converted(data[0]))
