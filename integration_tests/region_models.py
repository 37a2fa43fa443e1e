"""What the tests of learning on samples share: small networks, prepared once by each host, and both ends of a pass."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx
from torch.export import Dim
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from adaround_plugin import adaround, get_weight_only_backend_config
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.learning.passes import Pass
from integration_tests.models import keep_passes, own_mapping, relative_error, run_stream
from integration_tests.pt2e_models import x86

# host and bits of activations; None leaves these in float
CASES: list[tuple[str, int | None]] = [("fx", 4), ("fx", None), ("pt2e", 4), ("pt2e", None)]


def samples(count: int = 48, size: int = 16, seed: int = 0) -> list[Tensor]:
    """Batches of small smooth images with two channels, some brighter than others."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(count, 2, 3, 3, generator=generator), size=6, mode="bilinear")
    noise = 0.1 * torch.randn(count, 2, 6, 6, generator=generator)
    return list((smooth + torch.randn(count, 2, 1, 1, generator=generator) + noise).split(size))


class Net(nn.Module):
    """A stem, a residual block with branches of two kinds, a transposed convolution, a functional one and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.a = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.act = nn.SiLU()
        self.b = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.short = nn.Conv2d(6, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.b(self.act(self.a(x))) + self.short(x))
        x = self.relu(self.up(x))
        x = F.conv2d(x, self.weight, None, 1, 0, 1, 1)
        return self.head(x.mean((2, 3)))


class ZeroPadded(Net):
    """The same without a padding that an export writes out."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(6, 6, 3, padding=1)


class Dense(nn.Module):
    """A network with an output for every position, a branch, and values that are quantized with one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.pool, self.c = nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.d, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.pool(torch.cat([self.a(x), self.b(x)], 1))).relu()
        return self.head((x + self.d(x)).relu())


class Twice(nn.Module):
    """One convolution at two call sites, the second behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(F.relu(self.a(x)))


@torch.library.custom_op("adaround_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An operator that was registered without a derivative."""
    return x.clone()


class Opaque(nn.Module):
    """Two linear layers, and between them an operator without a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.adaround_tests.opaque(self.a(x)))


def seeded(make: type[nn.Module]) -> nn.Module:
    """A network in eval mode whose weights do not depend on what ran before, and whose outputs depend on its inputs.

    With the weights that torch begins with, a few layers leave next to nothing of the inputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = make().eval()
        for weight in (parameter for parameter in net.parameters() if parameter.dim() > 1):
            nn.init.kaiming_normal_(weight)
    return net


def prepared_by(
    host: str, activation_bits: int | None, net: nn.Module, data: Sequence[Tensor], bits: int = 3, dynamic: bool = True
) -> fx.GraphModule:
    """A network prepared by `"fx"` or `"pt2e"`, and calibrated; exported for batches of any size if dynamic."""
    if host == "fx":
        backend = get_weight_only_backend_config() if activation_bits is None else None
        mapping = own_mapping(weight_bits=bits, activation_bits=activation_bits, symmetric=True, model=net)
        prepared = prepare_fx(net, mapping, (data[0],), backend_config=backend)
    else:
        quantizer = (
            AdaRoundWeightOnlyQuantizer(weight_bits=bits, symmetric=True)
            if activation_bits is None
            # its own observer chooses the range of fewer than 8 bits
            else x86(histogram=activation_bits < 8, weight_bits=bits, activation_bits=activation_bits)
        )
        shapes = ({0: Dim.AUTO},) if dynamic else None
        # only in strict programs, which take five times as long, does x86's quantizer find functional calls
        strict = activation_bits is not None
        program = torch.export.export(net, (data[0],), dynamic_shapes=shapes, strict=strict).module()
        prepared = prepare_pt2e(program, quantizer)
    with torch.no_grad():
        for batch in data:
            prepared(batch)
    return prepared


@functools.cache
def _prepared(host: str, activation_bits: int | None, make: type[nn.Module], bits: int, data: Any) -> fx.GraphModule:
    count, size, dynamic = data
    return prepared_by(host, activation_bits, seeded(make), samples(count, size), bits, dynamic)


def prepared(
    host: str = "fx",
    activation_bits: int | None = None,
    make: type[nn.Module] = Dense,
    *,
    bits: int = 3,
    count: int = 96,
    size: int = 16,
    dynamic: bool = True,
) -> fx.GraphModule:
    """A copy of a network prepared on `samples(count, size)`, which is prepared and exported once."""
    return copy.deepcopy(_prepared(host, activation_bits, make, bits, (count, size, dynamic)))


def learn_in(
    prepared: fx.GraphModule, data: Sequence[Tensor], *args: Any, **options: Any
) -> tuple[fx.GraphModule, Pass]:
    """`adaround` without a progress bar, and the pass that it made."""
    with pytest.MonkeyPatch.context() as patch:
        kept = keep_passes(patch)
        learned = adaround(prepared, data, *args, progress=False, **options)
    (run,) = kept
    return learned, run


def converted(host: str, activation_bits: int | None, learned: fx.GraphModule) -> fx.GraphModule:
    """What the host converts it to."""
    learned = copy.deepcopy(learned)
    if host == "pt2e":
        return convert_pt2e(learned)
    backend = get_weight_only_backend_config() if activation_bits is None else None
    return convert_to_reference_fx(learned, backend_config=backend)


def streamed(run: Pass, batch: Tensor) -> Tensor:
    """What the quantized stream of a pass makes of a batch."""
    with torch.no_grad():
        found = run_stream(run.streams[1], [batch])
    return found[0] if isinstance(found, tuple | list) else found


def held_out_error(run: Pass, model: nn.Module, exact: nn.Module, data: Sequence[Tensor]) -> float:
    """The relative error of a model's output on the samples that a pass held out."""
    held = torch.cat([run.sampling.held_out(i, len(batch)) for i, batch in enumerate(data)])
    with torch.no_grad():
        return relative_error([(exact(batch), model(batch)) for batch in data], held)
