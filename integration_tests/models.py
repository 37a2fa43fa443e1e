"""What the host tests share: the flow in one call, and readers of what was learned and of what was converted."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.nn.quantized.reference.modules.utils import ReferenceQuantizedModule
from torch.ao.quantization import HistogramObserver, MinMaxObserver, QConfig, QConfigMapping
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.observer import _is_activation_post_process
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.utils._pytree import tree_flatten

from adaround_plugin import METHODS, LayerWise, adaround, get_adaround_qconfig_mapping, get_weight_only_backend_config
from adaround_plugin.graph.streams import Stream
from adaround_plugin.learning.methods import Method
from adaround_plugin.learning.passes import Pass

# one recipe: the trials of "auto" are tested on their own
RECIPE: dict[str, Any] = {
    "propagate_error": True,
    "correct_bias": True,
    "column_weighting": "none",
    "damping": 0.01,
    "output_hessian": False,
}

# one recipe, and the fastest solver
QUICK = LayerWise(
    solver="gptq",
    propagate_error=True,
    correct_bias=True,
    column_weighting="none",
    damping=0.1,
    output_hessian=False,
)


def images(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise with an offset, so that zero points and biases matter."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def batches(*shape: int, sizes: Sequence[int] = (6, 6, 4)) -> list[Tensor]:
    """Batches of the given sizes, each of samples of `shape`."""
    return [images(size, *shape, seed=i) for i, size in enumerate(sizes)]


def relative_error(outputs: Sequence[tuple[Tensor, Tensor]], held: Tensor) -> float:
    """Mean squared error of held-out samples, over the variance of each entry about its mean over all samples.

    Args:
        outputs: float and quantized, of each batch, `(n, ...)`.
        held: whether a sample is held out, of all batches.
    """
    exact, quantized = (torch.cat(list(parts)).double() for parts in zip(*outputs, strict=True))
    assert len(exact) == len(held)
    return float((exact - quantized)[held].square().mean() / exact.var(0).mean())


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch as a loader yields it: tensor, tuple (positional) or dict (keywords)."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def own_mapping(backend: str = "x86", *, histogram: bool = False, **options: Any) -> QConfigMapping:
    """`get_adaround_qconfig_mapping` with activations observed by their extremes.

    The host's own activation observer, a histogram, takes most of the time of a small test: it is replaced unless asked
    for.
    """
    mapping = get_adaround_qconfig_mapping(backend, **options)
    if histogram:
        return mapping

    def quick(qconfig: QConfig | None) -> QConfig | None:
        observer = None if qconfig is None else getattr(qconfig.activation, "p", None)
        if observer is None or observer.func is not HistogramObserver:
            return qconfig
        return QConfig(activation=MinMaxObserver.with_args(**observer.keywords), weight=qconfig.weight)

    mapping.set_global(quick(mapping.global_qconfig))
    for chosen in (mapping.object_type_qconfigs, mapping.module_name_qconfigs, mapping.module_name_regex_qconfigs):
        chosen.update({key: quick(qconfig) for key, qconfig in chosen.items()})
    return mapping


def prepared_model(
    float_model: nn.Module, data: Sequence[Any], backend: str = "x86", mapping: Any = None, **options: Any
) -> fx.GraphModule:
    """`prepare_fx` and calibration on a copy; `options` go to `own_mapping`."""
    if mapping is None:
        mapping = own_mapping(backend, **options)
    first = data[0]
    example = tuple(first.values()) if isinstance(first, dict) else first if isinstance(first, tuple) else (first,)
    weight_only = options.get("activation_bits", 8) is None
    config = get_weight_only_backend_config() if weight_only else None
    prepared = prepare_fx(copy.deepcopy(float_model).eval(), mapping, example, backend_config=config)
    with torch.no_grad():
        for batch in data:
            call(prepared, copy.deepcopy(batch))
    return prepared


def keep_passes(patch: pytest.MonkeyPatch) -> list[Pass]:
    """A list that fills with the passes that `adaround` makes, without those of trials."""
    kept: list[Pass] = []

    class Kept(Pass):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            kept.append(self)

    patch.setattr("adaround_plugin.api.Pass", Kept)
    return kept


# what `learn` passes on to `adaround` itself
_ARGUMENTS = {
    *("finetune", "exclude", "inputs", "seed", "progress", "inplace", "backend_config", "float_model"),
    "integer_biases",
}


def with_layers(method: str | Method = "default", **options: Any) -> Method:
    """A method whose layers are decided by one recipe, and by these options of `LayerWise`."""
    chosen = METHODS[method].method if isinstance(method, str) else method
    return chosen.with_layers(replace(chosen.layers, **{**RECIPE, **options}))


def learn(prepared: nn.Module, data: Any, method: str | Method = "default", **options: Any) -> fx.GraphModule:
    """`adaround` with one recipe and no progress bar; options are its arguments, or those of `LayerWise`."""
    arguments = {name: options.pop(name) for name in _ARGUMENTS & options.keys()}
    return adaround(prepared, data, with_layers(method, **options), **{"progress": False, **arguments})


@dataclass(frozen=True)
class Quantized:
    """A quantized weight: integers (int64), scale and zero point (one entry or one per channel), axis, and bias."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    bias: Tensor | None

    def dequantize(self) -> Tensor:
        """`(q - zero_point) * scale` in float32."""
        view = [1] * self.integers.dim()
        if self.axis is not None:
            view[self.axis] = -1
        return (self.integers - self.zero_point.view(view)).float() * self.scale.float().view(view)


def assert_same(one: Quantized, other: Quantized) -> None:
    """Integers, scale, zero point, axis and bias are equal, exactly."""
    torch.testing.assert_close(one.integers, other.integers, rtol=0, atol=0)
    # packed parameters keep a scale as double: the float32 value of it is what was learned
    torch.testing.assert_close(one.scale.float(), other.scale.float(), rtol=0, atol=0)
    torch.testing.assert_close(one.zero_point, other.zero_point, rtol=0, atol=0)
    assert one.axis == other.axis
    assert (one.bias is None) == (other.bias is None)
    if one.bias is not None:
        torch.testing.assert_close(one.bias.detach(), other.bias.detach(), rtol=0, atol=0)


def _inner(module: nn.Module) -> nn.Module:
    return module[0] if isinstance(module, _FusedModule) else module


def learned(model: fx.GraphModule, name: str) -> Quantized:
    """What `adaround` left in the prepared model for a weighted node: its weight must lie on the observer's grid."""
    path, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(path), leaf)
    if isinstance(found, nn.Module):
        module = _inner(found)
        assert module.qconfig is found.qconfig
        weight, bias, observer = module.weight.detach(), module.bias, found.qconfig.weight()
        observer(weight)
    else:
        weight, bias = found.detach(), None
        users = [user for n in model.graph.nodes if n.op == "get_attr" and n.target == name for user in n.users]
        observers = {model.get_submodule(str(user.target)) for user in users if user.op == "call_module"}
        assert len(observers) == 1
        observer = observers.pop()
        calls = {user for node in users for user in node.users}
        biases = {n.args[2] if len(n.args) > 2 else n.kwargs.get("bias") for n in calls}
        if len(biases) == 1 and isinstance(node := biases.pop(), fx.Node):
            while node.op == "call_module":
                node = node.args[0]
            bias = getattr(model, str(node.target)).detach()
    scale, zero_point = observer.calculate_qparams()
    per_channel = observer.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
    axis = observer.ch_axis if per_channel else None
    assert _is_activation_post_process(observer)
    view = [1] * weight.dim()
    if axis is not None:
        view[axis] = -1
    coordinates = weight.double() / scale.double().view(view) + zero_point.view(view)
    integers = coordinates.round().long()
    assert int(integers.min()) >= observer.quant_min
    assert int(integers.max()) <= observer.quant_max
    result = Quantized(integers, scale, zero_point.long(), axis, bias)
    # on the grid, to the last bit
    assert torch.equal(result.dequantize(), weight)
    return result


def _of_tensor(weight: Tensor, bias: Tensor | None) -> Quantized:
    """A quantized tensor of torch."""
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        return Quantized(
            weight.int_repr().long(),
            weight.q_per_channel_scales(),
            weight.q_per_channel_zero_points().long(),
            weight.q_per_channel_axis(),
            bias,
        )
    scale, zero_point = torch.tensor([weight.q_scale()]), torch.tensor([weight.q_zero_point()])
    return Quantized(weight.int_repr().long(), scale, zero_point, None, bias)


def converted(model: fx.GraphModule, name: str) -> Quantized:
    """What a native or reference conversion holds for a module."""
    outer = model.get_submodule(name)
    module = outer[0] if isinstance(outer, nn.Sequential) else outer
    if isinstance(module, ReferenceQuantizedModule):
        return _of_tensor(module.get_quantized_weight().detach(), module.bias)
    assert callable(module.weight), f"{name} stayed float: {type(module)}"
    return _of_tensor(module.weight(), module.bias())


_UNPACK = {
    torch.ops.quantized.linear: torch.ops.quantized.linear_unpack,
    torch.ops.quantized.conv1d: torch.ops.quantized.conv1d_unpack,
    torch.ops.quantized.conv2d: torch.ops.quantized.conv2d_unpack,
    torch.ops.quantized.conv3d: torch.ops.quantized.conv3d_unpack,
    torch.ops.quantized.conv_transpose1d: torch.ops.quantized.conv_transpose1d_unpack,
    torch.ops.quantized.conv_transpose2d: torch.ops.quantized.conv_transpose2d_unpack,
    torch.ops.quantized.conv_transpose3d: torch.ops.quantized.conv_transpose3d_unpack,
}
_UNPACK.update(
    {
        getattr(torch.ops.quantized, f"{op.__name__}_relu"): unpack
        for op, unpack in list(_UNPACK.items())
        if "transpose" not in op.__name__
    }
)


def converted_function(model: fx.GraphModule) -> list[Quantized]:
    """What a native conversion holds for its functional operators, in graph order."""
    found = []
    for node in model.graph.nodes:
        if node.op == "call_function" and node.target in _UNPACK:
            packed = getattr(model, str(node.args[1].target))
            weight, bias = _UNPACK[node.target](packed)
            found.append(_of_tensor(weight, bias))
    return found


_FUNCTIONS = {
    F.linear,
    *(getattr(torch, f"conv{d}d") for d in (1, 2, 3)),
    *(getattr(torch, f"conv_transpose{d}d") for d in (1, 2, 3)),
}


def reference_function(model: fx.GraphModule) -> list[Quantized]:
    """What a reference conversion quantizes for its functional operators, in graph order."""
    found = []
    for node in model.graph.nodes:
        if node.op != "call_function" or node.target not in _FUNCTIONS:
            continue
        weight, bias = (
            node.args[i] if len(node.args) > i else node.kwargs.get(("", "weight", "bias")[i]) for i in (1, 2)
        )
        assert weight.target == "dequantize", f"{node} stayed float"
        weight = weight.args[0]
        values = [getattr(model, str(arg.target)) if isinstance(arg, fx.Node) else arg for arg in weight.args]
        values[0] = values[0].detach()
        bias = None if bias is None else getattr(model, str(bias.target)).detach()
        found.append(_of_tensor(weight.target(*values), bias))
    return found


class Functional(nn.Module):
    """A functional operator on parameters, with or without a bias."""

    def __init__(self, op: Any, weight_shape: Sequence[int], *arguments: Any, bias: int | None, relu: bool = False):
        super().__init__()
        self.op, self.arguments, self.relu = op, arguments, relu
        self.weight = nn.Parameter(torch.randn(*weight_shape) * 0.3)
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Tensor:
        x = self.op(x, self.weight, self.bias, *self.arguments)
        return F.relu(x) if self.relu else x


def observer_state(model: nn.Module) -> dict[str, Tensor]:
    """The statistics of every activation observer (weights of functional calls excepted by the caller)."""
    return {
        f"{name}.{key}": value.clone()
        for name, module in model.named_modules()
        if _is_activation_post_process(module)
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor)
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, cloned."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def assert_unchanged(before: dict[str, Tensor], model: nn.Module) -> None:
    """The model's parameters and buffers are those of the snapshot, bit for bit."""
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


# --- networks whose graphs are not chains of layers

SHAPE = (4, 6, 6)


def conv(inputs: int = 4, outputs: int = 4, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv(4, 2, 1)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(y) + y))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(4, 2, 1), conv(10, 3, 1)
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(self.pool(x)), F.max_pool2d(x, 3, 1, 1)], 1))


class Inplace(nn.Module):
    """Overwrites activations, read before and after, and its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv(4, 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x += 0.5
        y = self.a(x)
        z = self.b(y)
        y.relu_()
        z += y
        z.mul_(0.5)
        self.relu(z)
        return self.c(F.relu(z, inplace=True)) + x.mean()


class InplaceThenRead(nn.Module):
    """An in-place method whose result is dropped: later readers see the overwritten value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        y = self.a(x)
        y.relu_()
        return self.b(y)


class IndexFill(nn.Module):
    """Overwrites part of an activation and part of its input by methods."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 2)

    def forward(self, x):
        x.clamp_(-1.0, 1.0)
        y = self.a(x)
        y.masked_fill_(y > 0.5, 0.5)
        return self.b(y) + x.mean()


class ViewOverwritten(nn.Module):
    """An in-place operation on a view writes through to its base."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 2)

    def forward(self, x):
        y = self.a(x)
        y.flatten(1).mul_(2.0)
        return self.b(y)


class ViewOutlivesBase(ViewOverwritten):
    """A view is read after its base was overwritten."""

    def forward(self, x):
        y = self.a(x)
        z = y.reshape(x.shape[0], -1)
        y.add_(1.0)
        return self.b(y) + z.mean()


class PartsOverwritten(ViewOverwritten):
    """Parts that one operator returned are overwritten, and the whole read."""

    def forward(self, x):
        y = self.a(x)
        left, right = y.chunk(2, 1)
        left = left.sigmoid_()
        right = right.select(1, 0).mul_(3.0)
        return self.b(y) + left.mean() + right.mean()


class CopyOutlivesBase(ViewOverwritten):
    """What might be a view of an overwritten value is a copy, read before and after it is overwritten itself."""

    def forward(self, x):
        y = self.a(x).transpose(2, 3)
        z = y.reshape(x.shape[0], -1)
        y = y.relu_()
        part = z[:, 2]
        z = z.mul_(2.0)
        return self.b(y) + z.mean() + part.mean()


class AliasOverwritten(ViewOverwritten):
    """Modules that return their input itself, overwritten later."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.drop, self.relu = nn.Identity(), nn.Dropout(), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.a(x)
        return self.b(self.relu(self.drop(self.same(y)))) + y.mean()


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x, dim: int = 2, other=None, *, shift=None):
        y = self.a(x).transpose(dim, 3)
        if other is not None:
            y = y + other
        return self.b(y + shift)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, left, right):
        return self.b(self.a(left) + right)


class DictArgument(nn.Module):
    """One argument that is a dictionary of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, inputs):
        return self.b(self.a(inputs["left"]) + inputs["right"])


class TupleOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        y = self.a(x)
        return y, self.b(y)


class DictOutput(TupleOutput):
    def forward(self, x):
        y = self.a(x)
        return {"first": y, "rest": [self.b(y), y.shape[0]]}


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(2, 4, 1), conv(2, 4, 1)

    def forward(self, x):
        one, two = torch.split(self.a(x), 2, 1)
        three = torch.chunk(x, 2, dim=1)
        return self.b(one) + self.c(two) + self.b(three[0])


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = conv(), nn.Linear(36, 5)

    def forward(self, x):
        y = self.a(x)
        y = y.view(y.size(0), y.shape[1], -1)
        y = self.fc(y)
        return y.permute(0, 2, 1).reshape(y.size(0), -1)


class Called3(nn.Module):
    """A module called several times on values of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))) + self.a(x))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, left, right):
        return self.b(torch.relu(self.a(left))) - self.b(torch.relu(self.a(right)))


class Recursive(nn.Module):
    """`x = f(f(x))`: the weight's input depends on the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.f, self.last = conv(), conv(), conv(4, 2, 1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.f(x))
        return self.last(torch.relu(self.f(x)))


class Tied(nn.Module):
    """One parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv(4, 2, 1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.relu(self.a(x)) + torch.relu(self.b(x * 0.5)))


class TiedRecursive(Tied):
    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class FunctionalWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3) * 0.3)
        self.matrix = nn.Parameter(torch.randn(3, 4) * 0.3)
        self.offset = nn.Parameter(torch.randn(3))

    def forward(self, x):
        x = F.conv2d(x, self.kernel, None, (1, 1), (1, 1), (1, 1), 1)
        return F.linear(torch.relu(x).mean((2, 3)), self.matrix, self.offset)


class SharedFunctionalWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 5) * 0.3)

    def forward(self, x):
        return F.linear(torch.relu(x), self.matrix) + F.linear(x * 0.5, self.matrix)


class LowRankAdded(nn.Module):
    """A functional weight is the sum of a matrix and a product, as where an adapter is merged at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(6, 6) * 0.3)
        self.left, self.right = nn.Parameter(torch.randn(6, 2) * 0.3), nn.Parameter(torch.randn(2, 6) * 0.3)

    def forward(self, x):
        x = F.linear(torch.relu(self.first(x)), self.weight + self.left @ self.right)
        return self.last(torch.relu(x))


class Standardized(nn.Module):
    """The weight of a convolution is standardized at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(), conv(4, 2)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        x = F.conv2d(torch.relu(self.first(x)), (self.weight - mean) / std, None, (1, 1), (1, 1), (1, 1), 1)
        return self.last(torch.relu(x))


class Sliced(nn.Module):
    """Two projections use parts of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.weight, self.bias = nn.Parameter(torch.randn(12, 6) * 0.3), nn.Parameter(torch.randn(12))

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(F.linear(x, self.weight[:6], self.bias[:6]) * F.linear(x, self.weight[6:], self.bias[6:]))


class Generated(nn.Module):
    """A layer's output is another one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.generator, self.last = nn.Linear(6, 6), nn.Linear(6, 36), nn.Linear(6, 3)

    def forward(self, x):
        weight = self.generator(x.mean(0)).view(6, 6)
        return self.last(torch.relu(F.linear(self.first(x), weight)))


# functional weights that are computed, so that the other layers alone are learned
COMPUTED_WEIGHTS = (LowRankAdded, Standardized, Sliced, Generated)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lstm, self.gru = nn.Linear(5, 6), nn.LSTM(6, 6, batch_first=True), nn.GRU(6, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x, _ = self.lstm(self.inner(x))
        x, _ = self.gru(x)
        return self.last(x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(torch.relu(self.fc(self.embedding(tokens))).mean(1))


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        return self.b(torch.relu(self.a(x.float() / 255)))


class Opaque(nn.Module):
    """Control flow that no tracer follows, with a convolution in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = conv()

    def forward(self, x):
        return self.inside(x) if x.sum() > -1e9 else x


class WithOpaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.opaque, self.b = conv(), Opaque(), conv()

    def forward(self, x):
        return self.b(self.opaque(torch.relu(self.a(x))))


class Normalized(nn.Module):
    """Batch norm folds; layer norm, softmax and matmul stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = conv(), nn.BatchNorm2d(4)
        self.bn.running_mean = torch.randn(4)
        self.norm = nn.LayerNorm(36)
        self.q, self.v = nn.Linear(36, 8), nn.Linear(36, 8)

    def forward(self, x):
        x = self.norm(torch.relu(self.bn(self.a(x))).flatten(2))
        q = self.q(x)
        return torch.softmax(q @ q.transpose(1, 2), -1) @ self.v(x)


class Standalone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.b = conv(), Residual(), conv(2, 3)

    def forward(self, x):
        return self.b(self.inner(torch.relu(self.a(x))))


def _keyword_batches() -> list[Any]:
    return [{"x": x, "shift": x * 0.1, "other": x.flip(0)} for x in batches(*SHAPE)]


def _bytes(high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, high, (size, *shape), generator=generator).to(dtype) for size in (6, 6, 4)]


# an in-place operation on one name of a value that has two
ALIASED = (ViewOverwritten, ViewOutlivesBase, PartsOverwritten, CopyOutlivesBase, AliasOverwritten)
_ALIASES = [kind.__name__ for kind in ALIASED]

Make = Callable[[], tuple[nn.Module, list[Any]]]
NETS: dict[str, Make] = {
    **{
        kind.__name__: lambda kind=kind: (kind(), batches(*SHAPE))
        for kind in (
            *(Residual, Branches, Inplace, InplaceThenRead, IndexFill, *ALIASED),
            *(TupleOutput, DictOutput, Split, Views, Called3, Recursive, Tied, TiedRecursive, FunctionalWeights),
        )
    },
    "Keywords": lambda: (Keywords(), _keyword_batches()),
    "Pairs": lambda: (TwoInputs(), [(x, x.flip(0)) for x in batches(*SHAPE)]),
    "PairsByName": lambda: (TwoInputs(), [{"right": x, "left": x.flip(0)} for x in batches(*SHAPE)]),
    "DictArgument": lambda: (DictArgument(), [({"left": x, "right": x.flip(0)},) for x in batches(*SHAPE)]),
    "Siamese": lambda: (Siamese(), [(x, x.flip(0)) for x in batches(*SHAPE)]),
    "SharedFunctionalWeight": lambda: (SharedFunctionalWeight(), batches(5)),
    **{kind.__name__: lambda kind=kind: (kind(), batches(6)) for kind in (LowRankAdded, Sliced, Generated)},
    "Standardized": lambda: (Standardized(), batches(*SHAPE)),
    "Recurrent": lambda: (Recurrent(), batches(3, 5)),
    "Tokens": lambda: (Tokens(), _bytes(11, 7, dtype=torch.long)),
    "Int32Tokens": lambda: (Tokens(), _bytes(11, 7, dtype=torch.int32)),
    "Bytes": lambda: (Bytes(), _bytes(256, *SHAPE)),
    "WithOpaque": lambda: (WithOpaque(), batches(*SHAPE)),
    "Normalized": lambda: (Normalized(), batches(*SHAPE)),
    "Standalone": lambda: (Standalone(), batches(*SHAPE)),
}


def net_names(*, aliases: bool = False) -> list[str]:
    """The nets to learn on, without those that write to one name of a value that has two unless asked for."""
    return [name for name in NETS if aliases or name not in _ALIASES]


Prepared = tuple[nn.Module, fx.GraphModule, list[Any]]


def prepared_net(name: str, activation_bits: int | None = 8) -> Prepared:
    """Float model, calibrated prepared model and batches of a net; weight-only without activation bits."""
    return copy.deepcopy(_prepared_net(name, activation_bits))


@functools.cache
def _prepared_net(name: str, activation_bits: int | None) -> Prepared:
    model, prepared, data = fresh_net(name, activation_bits)
    with torch.no_grad():
        for batch in copy.deepcopy(data):
            call(prepared, batch)
    return model, prepared, data


def fresh_net(name: str, activation_bits: int | None = 8) -> Prepared:
    """Float model, prepared model that is not calibrated, and batches of a net."""
    torch.manual_seed(0)
    model, data = NETS[name]()
    model.eval()
    mapping = own_mapping(activation_bits=activation_bits)
    config = get_weight_only_backend_config() if activation_bits is None else None
    custom = PrepareCustomConfig()
    if name == "WithOpaque":
        custom.set_non_traceable_module_names(["opaque"])
    if name == "Standalone":
        custom.set_standalone_module_name("inner", mapping, (images(2, *SHAPE),), None, config)
    first = copy.deepcopy(data[0])
    if name == "Keywords":
        # traced with `dim` and `other` as inputs
        first = (first["x"], 2, first["other"], first["shift"])
    if name == "PairsByName":
        first = (first["left"], first["right"])
    example = first if isinstance(first, tuple) else (first,)
    prepared = prepare_fx(copy.deepcopy(model), mapping, example, prepare_custom_config=custom, backend_config=config)
    return model, prepared, data


def _plain(tree: Any) -> Any:
    """fx's immutable containers as plain ones."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if type(tree) is tuple:
        return tuple(map(_plain, tree))
    return [*map(_plain, tree)] if isinstance(tree, list) else tree


def assert_equal_trees(one: Any, other: Any) -> None:
    """Same structure, same bits."""
    (ours, structure), (theirs, expected) = tree_flatten(_plain(one)), tree_flatten(_plain(other))
    assert structure == expected
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


def run_stream(stream: Stream, arguments: Sequence[Any]) -> Any:
    """What a stream makes of inputs, from these on, however far it has got."""
    stream.done = set(stream.placeholders)
    values = stream.bind(arguments)
    stream.run_nodes(values, stream.runnable(set()))
    return stream.value(stream.output_node.args[0], values)


def arguments_of(prepared: nn.Module, batch: Any) -> list[Any]:
    """A batch in the order of the placeholders, defaults filled in."""
    placeholders = [node for node in prepared.graph.nodes if node.op == "placeholder"]
    if isinstance(batch, dict):
        return [batch[str(n.target)] if str(n.target) in batch else n.args[0] for n in placeholders]
    given = list(batch) if isinstance(batch, tuple) else [batch]
    return given + [node.args[0] for node in placeholders[len(given) :]]


class Uncompared:
    """In place of the comparison with nearest, which runs the network again."""

    def __init__(self, *args: object) -> None:
        pass

    def take_back(self, run: Pass) -> tuple[float, float]:
        """The error of the pass, and none of nearest."""
        return run.finish().mean, 0.0


def uncompared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes end without a comparison with nearest."""
    monkeypatch.setattr("adaround_plugin.api.Comparison", Uncompared)
