"""AdaRound once more, as plainly as the paper puts it, to hold the package's paper preset against.

Nothing here comes from the package: layers are `nn.Conv2d` and `nn.Linear` of a model whose batch norms are folded,
each followed by a ReLU or not, found with forward hooks; two full copies of the model give `x` and `x^`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["adaround_as_published", "nearest", "scale_of"]

GAMMA, ZETA = -0.1, 1.1
LAMBDA = 0.01


def scale_of(weight: Tensor, bits: int) -> float:
    """One scale for the weight, by minimum squared error: 200 candidates."""
    high = 2 ** (bits - 1)
    largest = float(weight.abs().max()) / (high - 1)
    candidates = [largest * (i + 1) / 200 for i in range(200)]

    def error(scale: float) -> float:
        q = torch.clamp(torch.round(weight / scale), -high, high - 1)
        return float((q * scale - weight).square().sum())

    best: float = min(candidates, key=error)
    return best


def nearest(model: nn.Module, bits: int) -> nn.Module:
    """Every weight rounded to nearest on its scale."""
    model = copy.deepcopy(model)
    for layer in _layers(model):
        s, high = scale_of(layer.weight.data, bits), 2 ** (bits - 1)
        layer.weight.data = s * torch.clamp(torch.round(layer.weight.data / s), -high, high - 1)
    return model


def _layers(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def _input_and_output(model: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a layer and comes out of it, for all images."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for part in torch.split(images, 128):
            model(part)
    hook.remove()
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])


def adaround_as_published(
    model: nn.Module,
    bits: int,
    images: Tensor,
    followed_by_relu: Callable[[str], bool],
    iterations: int,
    learning_rate: float,
    seed: int,
    scales: Mapping[str, float] | None = None,
    relative: bool = False,
) -> nn.Module:
    """Equations 21 to 25, layer after layer: `|| f_a(W x) - f_a(W~ x^) ||^2 + lambda f_reg(V)` by Adam, 32 at a time.

    The squared error is summed over channels, and averaged over samples and positions; `f_reg` is summed over weights.

    Args:
        followed_by_relu: whether `f_a` of the layer of that name is ReLU; else it is the identity.
        seed: of the minibatches of each layer.
        scales: of the layers, by name; else those of `scale_of`.
        relative: let lambda be 1, the error relative to that of round-to-nearest, and `f_reg` the mean over weights;
            else lambda is 0.01.
    """
    rounded = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for name, layer in rounded.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        activation = F.relu if followed_by_relu(name) else (lambda y: y)
        _, target = _input_and_output(model, modules[name], images)
        inputs, _ = _input_and_output(rounded, layer, images)
        target = activation(target)
        weight = layer.weight.data
        s = scale_of(weight, bits) if scales is None else scales[name]
        n, p = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        regularization = LAMBDA
        if relative:
            with torch.no_grad():
                output = activation(_apply(layer, inputs, s * torch.clamp(torch.round(weight / s), n, p)))
            regularization = float((output - target).square().sum(1).mean()) / weight.numel()
        generator = torch.Generator().manual_seed(seed)
        floor = torch.floor(weight / s)
        v = torch.logit((weight / s - floor - GAMMA) / (ZETA - GAMMA)).requires_grad_()
        optimizer = torch.optim.Adam([v], lr=learning_rate)
        for i in range(iterations):
            chosen = torch.randperm(len(inputs), generator=generator)[:32]
            h = torch.clamp(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)
            soft = s * torch.clamp(floor + h, n, p)
            output = activation(_apply(layer, inputs[chosen], soft))
            loss = (output - target[chosen]).square().sum(1).mean()
            if i >= 0.2 * iterations:
                rest = (i - 0.2 * iterations) / (0.8 * iterations)
                beta = 2 + (20 - 2) * 0.5 * (1 + math.cos(math.pi * rest))
                loss = loss + regularization * (1 - (2 * h - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        h = torch.clamp(torch.sigmoid(v.detach()) * (ZETA - GAMMA) + GAMMA, 0, 1)
        layer.weight.data = s * torch.clamp(floor + (h >= 0.5), n, p)
    return rounded


def _apply(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, weight, layer.bias)
