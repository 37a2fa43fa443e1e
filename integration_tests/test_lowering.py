"""Programs lowered by `lower_to_executorch`: they run, and what cannot is named with backend, layer and remedy."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from torch import Tensor, fx, nn

from adaround_plugin import InvalidModelError, InvalidOptionError
from adaround_plugin.deployment.executorch_programs import lower_to_executorch
from adaround_plugin.hosts.pt2e import AdaRoundQuantizer
from integration_tests.benchmarks.executorch_backends import run_program, steps_apart
from integration_tests.benchmarks.vendor_quantizers import VENDORS, learn, samples
from integration_tests.models import QUICK

DATA = samples(count=2)


class Small(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))


@functools.cache
def converted(bits: int = 8) -> fx.GraphModule:
    """A learned network for XNNPACK; not to be changed."""
    return learn("XNNPACK", AdaRoundQuantizer(VENDORS["XNNPACK"](), bits), DATA, QUICK, Small).converted


def test_a_backend_runs_what_it_takes_and_the_converted_program_stays_as_it_is() -> None:
    before = converted().code
    program = lower_to_executorch(converted(), (DATA[0],), [XnnpackPartitioner()])
    assert steps_apart(converted(), program.buffer, DATA[0]).max() < 1.01
    assert converted().code == before


def test_the_portable_kernels_run_what_was_converted() -> None:
    program = lower_to_executorch(converted(2), (DATA[0],))
    torch.testing.assert_close(run_program(program.buffer, DATA[0]), converted(2)(DATA[0]), rtol=0, atol=1e-5)


def test_layers_that_the_backend_leaves_out_are_named() -> None:
    from executorch.backends.xnnpack.partition.config.gemm_configs import ConvolutionConfig

    nothing_else = [XnnpackPartitioner(configs=[ConvolutionConfig])]
    with pytest.raises(InvalidModelError, match=r"XnnpackPartitioner: layers \['head'\].*in float.*partial=True"):
        lower_to_executorch(converted(), (DATA[0],), nothing_else)
    program = lower_to_executorch(converted(), (DATA[0],), nothing_else, partial=True)
    assert steps_apart(converted(), program.buffer, DATA[0]).max() < 1.01


def test_a_layer_that_the_backend_cannot_compile_is_named_with_the_remedy() -> None:
    match = (
        r"XnnpackPartitioner: layer 'conv': the backend failed \(AssertionError: convert_to_qc4w.*widen_weight_range"
    )
    with pytest.raises(InvalidModelError, match=match) as caught:
        lower_to_executorch(converted(4), (DATA[0],), [XnnpackPartitioner()])
    assert isinstance(caught.value.__cause__, AssertionError)


@pytest.mark.parametrize(
    "value",
    [XnnpackPartitioner, XnnpackPartitioner(), [XnnpackPartitioner], "XNNPACK"],
    ids=["class", "one", "in", "name"],
)
def test_what_is_no_partitioner_is_refused(value: Any) -> None:
    with pytest.raises(InvalidOptionError, match=r"partitioners: .*\[XnnpackPartitioner\(\)\]"):
        lower_to_executorch(converted(), (DATA[0],), value)


def test_an_example_that_is_no_tuple_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"example: Tensor is no tuple.*\(x,\)"):
        lower_to_executorch(converted(), DATA[0], [XnnpackPartitioner()])  # type: ignore[arg-type]


def test_what_is_not_converted_is_refused() -> None:
    with pytest.raises(InvalidModelError, match=r"converted: is Linear.*convert_pt2e"):
        lower_to_executorch(nn.Linear(2, 2), (DATA[0],), [XnnpackPartitioner()])  # type: ignore[arg-type]


def test_an_example_that_does_not_fit_is_named() -> None:
    with pytest.raises(InvalidOptionError, match="example: the program cannot be exported with it"):
        lower_to_executorch(converted(), (DATA[0], DATA[0]))
