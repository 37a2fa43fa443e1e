"""Small networks in which some layers can be equalized against each other, and which these are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import l1_unstructured

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """A network, the shape of its input, and the pairs of layers that there are to be found."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    pairs: Pairs


class Net(nn.Module):
    """Modules by name, called by a function of them and the input."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with all drawn anew: channels of different ranges, batch norm that has seen something.

    Nothing is left of the initial weights, which are drawn where a test file is imported, before any seed is set.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_mean.copy_(noise(module.running_mean))
                module.running_var.copy_(noise(module.running_var).exp())
                if module.affine:
                    # some gammas are negative
                    module.weight.copy_(noise(module.weight) * noise(module.weight).exp())
                    module.bias.copy_(noise(module.bias))
            elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                fan_in = module.weight[0].numel()
                module.weight.copy_(noise(module.weight) * noise(module.weight[:, :1]).exp() / math.sqrt(fan_in))
                if module.bias is not None:
                    module.bias.copy_(noise(module.bias) / math.sqrt(fan_in))
    return model.eval()


def sequence(*modules: nn.Module) -> Callable[[], nn.Module]:
    """A network that calls copies of modules one after the other."""
    return lambda: nn.Sequential(*copy.deepcopy(modules))


def residual() -> nn.Module:
    """A block whose two convolutions are a pair, between layers that others read too."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        y = net.conv2(net.act(net.bn1(net.conv1(x))))
        return net.head((x + y).relu().mean((2, 3)))

    return Net(
        run,
        stem=nn.Conv2d(3, 4, 3),
        conv1=nn.Conv2d(4, 6, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(6),
        act=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(6, 4, 3, padding=1),
        head=nn.Linear(4, 5),
    )


def functional() -> nn.Module:
    """Functional and method forms, and a view that asks for the batch size."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(net.a(x)), 2)
        x = F.dropout(F.leaky_relu(net.b(F.pad(x, (1, 1, 1, 1))), 0.2), training=net.training)
        x = F.interpolate(net.c(x).relu_(), scale_factor=2, mode="bilinear")
        x = F.adaptive_avg_pool2d(F.relu(net.d(x), inplace=True), 2)
        return net.e(x.view(x.size(0), -1))

    return Net(
        run,
        a=nn.Conv2d(3, 4, 3),
        b=nn.Conv2d(4, 5, 3),
        c=nn.Conv2d(5, 6, 1),
        d=nn.Conv2d(6, 3, 1),
        e=nn.Linear(12, 4),
    )


ZOO = {
    "perceptron": Case(
        sequence(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.PReLU(6), nn.Linear(6, 3)),
        (5,),
        [("0", "2"), ("2", "4")],
    ),
    "tokens": Case(sequence(nn.Linear(5, 7), nn.LeakyReLU(0.1), nn.Linear(7, 6)), (4, 5), [("0", "2")]),
    "linear batch norm": Case(
        sequence(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)), (5,), [("0", "3")]
    ),
    "no activation": Case(sequence(nn.Conv1d(3, 4, 3), nn.Identity(), nn.Conv1d(4, 2, 3)), (3, 9), [("0", "2")]),
    "inverted residual": Case(
        sequence(
            *(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)),
        ),
        (3, 6, 6),
        [("0", "3"), ("3", "6")],
    ),
    "norm without parameters": Case(
        sequence(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        (3, 6, 6),
        [("0", "3")],
    ),
    "grouped": Case(
        sequence(
            nn.Conv2d(4, 6, 3, groups=2, padding_mode="reflect", padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 4, 2, groups=2, stride=2, dilation=2),
        ),
        (4, 8, 8),
        [("0", "2")],
    ),
    "transposed": Case(
        sequence(
            *(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2, stride=2)),
            *(nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2)),
        ),
        (3, 7, 7),
        [("0", "2"), ("2", "5")],
    ),
    "three dimensions": Case(
        sequence(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.AvgPool3d(2, padding=1), nn.ConvTranspose3d(4, 2, 2)),
        (2, 5, 5, 5),
        [("0", "3")],
    ),
    "flatten": Case(
        sequence(
            *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout2d(), nn.MaxPool2d(2, ceil_mode=True)),
            *(nn.Flatten(), nn.Linear(4 * 9, 6), nn.ReLU(), nn.Linear(6, 2)),
        ),
        (3, 8, 8),
        [("0", "5"), ("5", "7")],
    ),
    "padding and resizing": Case(
        sequence(
            *(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.ZeroPad1d(1), nn.Conv1d(3, 3, 3), nn.ReplicationPad1d(2)),
            *(nn.Upsample(scale_factor=2), nn.AdaptiveMaxPool1d(4), nn.Conv1d(3, 2, 2)),
        ),
        (2, 6),
        [("0", "3"), ("3", "7")],
    ),
    "residual": Case(residual, (3, 8, 8), [("conv1", "conv2")]),
    "functional": Case(functional, (3, 10, 10), [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e")]),
}


def tied() -> nn.Module:
    """Two layers with one weight."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model[0].weight = model[2].weight
    return model


def read_twice() -> nn.Module:
    """A layer whose weight the model reads by itself as well."""
    return Net(lambda net, x: F.linear(net.b(F.relu(net.a(x))), net.b.weight.t()), a=nn.Linear(4, 4), b=nn.Linear(4, 4))


def shared_norm() -> nn.Module:
    """Two layers with one batch norm."""
    return Net(
        lambda net, x: net.c(F.relu(net.norm(net.b(F.relu(net.norm(net.a(x))))))),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        c=nn.Linear(4, 3),
        norm=nn.BatchNorm1d(4),
    )


def pruned() -> nn.Module:
    """A layer whose weight is computed from another parameter."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    l1_unstructured(model[0], "weight", 0.5)
    with torch.no_grad():
        # computes the weight anew, without a gradient, so that the model can be copied
        model(torch.zeros(1, 4))
    return model


def normalized() -> nn.Module:
    """A layer whose weight is a parametrization."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    weight_norm(model[2])
    return model


# network, shape of its input, the layer that is not first in a pair, and two words that tell why: what stands in the
# way, and how
LONELY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, tuple[str, str]]] = {
    "called twice": (
        lambda: Net(lambda net, x: net.b(F.relu(net.a(F.relu(net.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
        (4,),
        "a",
        ("'a'", "2 times"),
    ),
    "second called twice": (
        lambda: Net(lambda net, x: net.b(F.relu(net.b(F.relu(net.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        (4,),
        "a",
        ("'b'", "2 times"),
    ),
    "tied": (tied, (4,), "0", ("'0'", "shares")),
    "read by the graph": (read_twice, (4,), "a", ("'b'", "shares")),
    "pruned": (pruned, (4,), "0", ("'0'", "computed")),
    "parametrized": (normalized, (4,), "2", ("'2'", "derived")),
    "second parametrized": (normalized, (4,), "0", ("'2'", "derived")),
    "functional layer": (read_twice, (4,), "linear", ("functional", "call")),
    "shared batch norm": (shared_norm, (4,), "a", ("'norm' (BatchNorm1d)", "scale of a channel")),
    "batch norm of tokens": (
        sequence(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)),
        (4, 5),
        "0",
        ("'1' (BatchNorm1d)", "scale of a channel"),
    ),
    "batch statistics": (
        sequence(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)),
        (5,),
        "0",
        ("'1' (BatchNorm1d)", "scale of a channel"),
    ),
    "not homogeneous": (
        sequence(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)),
        (5,),
        "0",
        ("'1' (GELU)", "scale of a channel"),
    ),
    "added": (
        lambda: Net(lambda net, x: net.b(net.a(x) + x), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
        (4,),
        "a",
        ("'add'", "scale of a channel"),
    ),
    "read twice": (
        lambda: Net(lambda net, x: net.b(y := net.a(x)) + y, a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        (4,),
        "a",
        ("'a'", "2 operations"),
    ),
    "returned": (
        lambda: Net(lambda net, x: net.a(x), a=nn.Linear(4, 4)),
        (4,),
        "a",
        ("'a'", "output"),
    ),
    "used by none": (
        lambda: Net(lambda net, x: (net.a(x), x)[1], a=nn.Linear(4, 4)),
        (4,),
        "a",
        ("'a'", "0 operations"),
    ),
    "other axis": (
        sequence(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Linear(6, 2)),
        (3, 6),
        "0",
        ("'2'", "channels from"),
    ),
    "mixed axes": (
        lambda: Net(lambda net, x: net.b(net.a(x).transpose(1, 2)), a=nn.Conv1d(3, 4, 1), b=nn.Linear(4, 2)),
        (3, 6),
        "a",
        ("'transpose'", "scale of a channel"),
    ),
    "pooled channels": (
        sequence(nn.Linear(5, 4), nn.MaxPool1d(2), nn.Linear(2, 2)),
        (3, 5),
        "0",
        ("'1' (MaxPool1d)", "scale of a channel"),
    ),
    "averaged channels": (
        lambda: Net(lambda net, x: net.b(net.a(x).mean(1)), a=nn.Conv1d(3, 4, 1), b=nn.Linear(6, 2)),
        (3, 6),
        "a",
        ("'mean'", "scale of a channel"),
    ),
    "padded with ones": (
        lambda: Net(
            lambda net, x: net.b(F.pad(net.a(x), (1, 1), value=1.0)), a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(4, 2, 3)
        ),
        (3, 6),
        "a",
        ("'pad'", "scale of a channel"),
    ),
    "channels torn apart": (
        lambda: Net(lambda net, x: net.b(net.a(x).view(-1, 2, 12)), a=nn.Conv1d(3, 4, 1), b=nn.Linear(12, 2)),
        (3, 6),
        "a",
        ("'view'", "scale of a channel"),
    ),
    "dropout that drops": (
        lambda: Net(lambda net, x: net.b(F.dropout(net.a(x), 0.0)), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        (4,),
        "a",
        ("'dropout'", "scale of a channel"),
    ),
    "indices of a maximum": (
        lambda: Net(
            lambda net, x: net.b(net.pool(net.a(x))[0]),
            a=nn.Conv1d(3, 4, 1),
            pool=nn.MaxPool1d(2, return_indices=True),
            b=nn.Conv1d(4, 2, 1),
        ),
        (3, 6),
        "a",
        ("'pool' (MaxPool1d)", "scale of a channel"),
    ),
    "functional ReLU6": (
        lambda: Net(lambda net, x: net.b(F.relu6(net.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        (4,),
        "a",
        ("'relu6'", "scale of a channel"),
    ),
    "ReLU6 for several": (
        lambda: Net(
            lambda net, x: net.b(net.act(net.a(net.act(x)))), a=nn.Linear(4, 4), b=nn.Linear(4, 2), act=nn.ReLU6()
        ),
        (4,),
        "a",
        ("'act' (ReLU6)", "several layers"),
    ),
    "no clip from zero": (
        sequence(nn.Linear(4, 4), nn.Hardtanh(-1.0, 1.0), nn.Linear(4, 2)),
        (4,),
        "0",
        ("'1' (Hardtanh)", "scale of a channel"),
    ),
}
