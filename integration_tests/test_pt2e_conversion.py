"""The conversion that the PT2E host makes of its copy, beside torchao's own, which `test_pt2e_streams` compares."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization.pt2e import qat_utils

from adaround_plugin.hosts.pt2e.conversion import converted
from integration_tests.pt2e_models import calibrated, copied, exported, operator, x86

DATA = [(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),)]


class PreActivated(nn.Module):
    """Batch norms that no convolution takes in: of an input, of a sum, and of a quotient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.second, self.third = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.second(self.conv(x) + x)
        return self.third(torch.relu(x) / 3.0)


class Trained(nn.Module):
    """What `prepare_qat_pt2e` makes of a convolution and its batch norm, written by hand."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4)

    def forward(self, x):
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + 1e-5)
        x = F.conv2d(x, self.conv.weight * scale.reshape(-1, 1, 1, 1)) / scale.reshape(1, -1, 1, 1)
        return self.norm(x if self.conv.bias is None else x + self.conv.bias.reshape(1, -1, 1, 1))


class PatternExportedError(Exception):
    """torchao begins to look for what was prepared for quantization-aware training."""


@pytest.fixture(autouse=True)
def _patterns(monkeypatch):
    def export(*args, **kwargs):
        raise PatternExportedError

    monkeypatch.setattr(qat_utils, "_get_aten_graph_module_for_pattern", export)


def prepared(model: nn.Module):
    return calibrated(exported(model.eval(), DATA[0]), DATA, x86())


def test_patterns_are_not_exported_where_none_can_be_found():
    model = prepared(PreActivated())
    names = [operator(node) for node in model.graph.nodes if "batch_norm" in str(node.target)]
    program = converted(copied(model))
    norms = [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert len(names) == 3
    assert [operator(node) for node in norms] == names
    assert all(isinstance(node.target, torch._ops.OpOverload) for node in norms)
    assert "batch_norm.default" in program.code


@pytest.mark.parametrize("bias", [False, True])
def test_patterns_are_exported_where_one_may_be_found(bias):
    with pytest.raises(PatternExportedError):
        converted(prepared(Trained(bias)))
