"""What the PT2E tests share: the flow in one call, a quantizer for every operator, readers of both its ends."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import (
    AffineQuantizedObserverBase,
    FakeQuantizeBase,
    MinMaxObserver,
    ObserverBase,
    PlaceholderObserver,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer
from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

from adaround_plugin.hosts.fx.observers import FrozenMixin
from adaround_plugin.hosts.pt2e import get_adaround_weight_spec, get_adaround_x86_inductor_config
from adaround_plugin.hosts.pt2e.host import PreparedPT2E
from integration_tests.models import COMPUTED_WEIGHTS, SHAPE, Make, Quantized, batches, call, conv
from integration_tests.models import NETS as FX_NETS

# an operator's name without its overload: linear, conv2d, conv_transpose2d, ...
WEIGHTED = {"linear", *(f"{kind}{d}d" for kind in ("conv", "conv_transpose") for d in (1, 2, 3))}

# --- the flow


def split(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments."""
    if isinstance(batch, dict):
        return (), batch
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def exported(model: nn.Module, batch: Any, dynamic_shapes: Any = None, strict: bool = False) -> fx.GraphModule:
    """The module of the export of a model in eval mode.

    A strict one takes five times as long; torchao's quantizers find functional calls only there.
    """
    args, kwargs = split(copy.deepcopy(batch))
    program = torch.export.export(model.eval(), args, kwargs, strict=strict, dynamic_shapes=dynamic_shapes)
    return program.module()


def x86(*, histogram: bool = False, **options: Any) -> Quantizer:
    """X86InductorQuantizer with AdaRound's weight observer.

    Its own activation observer, a histogram, takes most of the time of a small test: it is replaced unless asked for.
    """
    config = get_adaround_x86_inductor_config(**options)
    if config.input_activation is not None and not config.input_activation.is_dynamic and not histogram:
        observer = MinMaxObserver.with_args(eps=2**-12)
        activation = replace(config.input_activation, observer_or_fake_quant_ctr=observer)
        config = replace(config, input_activation=activation, output_activation=activation)
    return X86InductorQuantizer().set_global(config)


def xnnpack(weight_bits: int = 4, per_channel: bool = True, is_dynamic: bool = False) -> Quantizer:
    """The XNNPACK quantizer with AdaRound's weight observer."""
    config = get_symmetric_quantization_config(is_per_channel=per_channel, is_dynamic=is_dynamic)
    if not is_dynamic:
        observer = MinMaxObserver.with_args(eps=2**-12)
        activation = replace(config.input_activation, observer_or_fake_quant_ctr=observer)
        config = replace(config, input_activation=activation, output_activation=activation)
    spec = get_adaround_weight_spec(weight_bits, per_channel)
    with warnings.catch_warnings():
        # torchao kept it for tests; executorch has the one to use
        warnings.filterwarnings("ignore", "XNNPACKQuantizer is deprecated", UserWarning)
        return XNNPACKQuantizer().set_global(replace(config, weight=spec))


STATIC = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12),
)
DYNAMIC = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    is_dynamic=True,
    observer_or_fake_quant_ctr=PlaceholderObserver.with_args(eps=2**-12),
)


class EveryOperator(Quantizer):
    """Annotates the weight of every linear layer and convolution, and the input where activations are quantized.

    Args:
        weight_bits, per_channel, symmetric: of the weights; channels of transposed convolutions run along axis 1.
        activation: how inputs are quantized, if at all.
        derived_bias: quantize biases to int32 with the product of the scales of input and weight.
        weight: a specification in place of AdaRound's.
        transposed_axis: the channel axis of transposed convolutions.
    """

    def __init__(
        self,
        weight_bits: int = 4,
        per_channel: bool = True,
        symmetric: bool = True,
        activation: Literal["static", "dynamic"] | None = "static",
        derived_bias: bool = False,
        weight: QuantizationSpec | None = None,
        transposed_axis: int = 1,
    ) -> None:
        super().__init__()
        self.options = {"weight_bits": weight_bits, "per_channel": per_channel, "symmetric": symmetric}
        self.activation = {"static": STATIC, "dynamic": DYNAMIC, None: None}[activation]
        self.derived_bias, self.weight, self.transposed_axis = derived_bias, weight, transposed_axis

    def spec(self, node: fx.Node) -> QuantizationSpec:
        """How the weight of `node` is quantized."""
        axis = self.transposed_axis if "transpose" in operator(node) else 0
        return self.weight or get_adaround_weight_spec(**self.options, ch_axis=axis)

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        for node in weighted_calls(model):
            specs: dict[fx.Node, Any] = {node.args[1]: self.spec(node)}
            if self.activation is not None:
                specs[node.args[0]] = self.activation
            if self.derived_bias and bias_node(node) is not None:
                specs[bias_node(node)] = DerivedQuantizationSpec(
                    derived_from=[(node.args[0], node), (node.args[1], node)],
                    derive_qparams_fn=product_of_scales,
                    dtype=torch.int32,
                    quant_min=-(2**31),
                    quant_max=2**31 - 1,
                    qscheme=torch.per_channel_symmetric,
                    ch_axis=0,
                )
            node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Anything goes."""


def product_of_scales(observers: Any) -> tuple[Tensor, Tensor]:
    """The scale of a bias: that of the input by those of the weight."""
    activation, weight = observers
    scale = activation.calculate_qparams()[0] * weight.calculate_qparams()[0]
    return scale.float(), torch.zeros_like(scale, dtype=torch.int64)


def calibrated(program: fx.GraphModule, data: Sequence[Any], quantizer: Quantizer) -> fx.GraphModule:
    """`prepare_pt2e` and calibration on a copy of an exported program's module."""
    prepared = prepare_pt2e(copy.deepcopy(program), quantizer)
    with torch.no_grad():
        for batch in data:
            call(prepared, copy.deepcopy(batch))
    return prepared


def prepared_pt2e(
    model: nn.Module, data: Sequence[Any], quantizer: Quantizer | None = None, strict: bool = False
) -> fx.GraphModule:
    """Export, `prepare_pt2e` (for x86 with 4-bit weights by default) and calibration."""
    return calibrated(exported(model, data[0], strict=strict), data, x86() if quantizer is None else quantizer)


def copied(prepared: fx.GraphModule) -> fx.GraphModule:
    """A deep copy that can be converted: `deepcopy` leaves annotations at nodes that are not in the copy's graph.

    `convert_pt2e` looks for these nodes where activations are quantized dynamically, and fails.
    """
    result = copy.deepcopy(prepared)
    nodes = {node.name: node for node in result.graph.nodes}
    for node in result.graph.nodes:
        annotation = node.meta.get("quantization_annotation")
        if annotation is not None:
            specs = {nodes[source.name]: spec for source, spec in annotation.input_qspec_map.items()}
            # the annotation itself is the original's, too
            node.meta["quantization_annotation"] = replace(annotation, input_qspec_map=specs)
    return result


def convert(result: fx.GraphModule, fold_quantize: bool = True) -> fx.GraphModule:
    """`convert_pt2e` of a copy."""
    return convert_pt2e(copied(result), fold_quantize=fold_quantize)


# --- networks whose graphs are not chains of layers: those of FX, and more


class Drops(nn.Module):
    """Dropout, as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = conv(), nn.Dropout(0.5), conv()

    def forward(self, x):
        x = F.dropout(self.a(x), 0.3, self.training)
        return self.b(self.drop(F.relu(x, inplace=True)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class AddInto(nn.Module):
    """In-place additions to activations that have other readers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv(4, 2)

    def forward(self, x):
        y = self.a(x)
        z = self.b(y.relu_())
        z.add_(y)
        z += x
        return self.c(z)


class Buffers(nn.Module):
    """A constant and a buffer in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()
        self.register_buffer("shift", torch.randn(4, 1, 1))

    def forward(self, x):
        return self.b(self.a(x) + self.shift + torch.ones(4, 1, 1))


class PartAssigned(nn.Module):
    """Parts of an activation are assigned, as decoders of boxes do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv(4, 2)

    def forward(self, x):
        y = self.a(x).view(x.shape[0], 2, 2, 6, 6).permute(0, 1, 3, 4, 2).contiguous()
        y[..., 0:1] = y[..., 0:1] * 2.0 - 0.5
        y[..., 1:2] = (y[..., 1:2] * 2.0) ** 2
        return self.b(torch.relu(x)), y


class MaskAssigned(PartAssigned):
    """A constant is made part by part, as the mask of shifted windows is."""

    def forward(self, x):
        mask = x.new_zeros((6, 6))
        mask[:4].fill_(1.0)
        mask[4:, 2:] = 2.0
        mask.view(2, 3, 2, 3)[0, :, 1] = 0.5
        return self.b(self.a(x) * mask)


class ViewsOverwritten(PartAssigned):
    """Views of views are overwritten, and read beside views that were taken earlier."""

    def forward(self, x):
        y = self.a(x)
        flat = y.view(x.shape[0], -1)
        part, channel = flat[:, 3:9], y[:, 0]
        flat.mul_(2.0)
        part.add_(1.0)
        return self.b(y + 0.0) + channel.mean() + flat.sum() * 1e-3 + part.mean()


class BatchStatistics(nn.Module):
    """A batch norm without running statistics, which has those of the batch in eval mode too, and one of a weight.

    A convolution's weight is standardized by a batch norm in training mode, as in networks without normalizers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = conv(), nn.BatchNorm2d(4, track_running_stats=False), conv(4, 2)
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        rows = self.weight.reshape(1, 4, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return self.b(F.conv2d(self.norm(torch.relu(self.a(x))), weight))


# control flow that no export follows, in-place operations that have no derivative, computed weights that conversion
# folds, and nets that are others again
_COMPUTED = [kind.__name__ for kind in COMPUTED_WEIGHTS]
_NOT_EXPORTED = ("WithOpaque", "PartsOverwritten", *_COMPUTED, "Standalone", "Int32Tokens")

NETS: dict[str, Make] = {
    **{name: make for name, make in FX_NETS.items() if name not in _NOT_EXPORTED},
    "Drops": lambda: (Drops(), batches(*SHAPE)),
    "Attention": lambda: (Attention(), batches(5, 6)),
    "AddInto": lambda: (AddInto(), batches(*SHAPE)),
    "Buffers": lambda: (Buffers(), batches(*SHAPE)),
    "PartAssigned": lambda: (PartAssigned(), batches(*SHAPE)),
    "MaskAssigned": lambda: (MaskAssigned(), batches(*SHAPE)),
    "ViewsOverwritten": lambda: (ViewsOverwritten(), batches(*SHAPE)),
    "BatchStatistics": lambda: (BatchStatistics(), batches(*SHAPE)),
}


@functools.cache
def exported_net(name: str) -> tuple[nn.Module, fx.GraphModule, list[Any]]:
    """Float model, exported program and batches of one size, for which the program is; not to be changed."""
    torch.manual_seed(0)
    model, data = NETS[name]()
    data = data[:2]
    return model, exported(model, data[0], strict=True), data


def prepared_net(name: str, quantizer: Quantizer | None = None) -> tuple[fx.GraphModule, list[Any]]:
    """Calibrated prepared model, for x86 with 4-bit weights by default, and batches of a net."""
    _, program, data = exported_net(name)
    prepared = copied(_prepared_net(name)) if quantizer is None else calibrated(program, data, quantizer)
    return prepared, copy.deepcopy(data)


@functools.cache
def _prepared_net(name: str) -> fx.GraphModule:
    _, program, data = exported_net(name)
    return calibrated(program, data, x86())


def leaves_of(host: PreparedPT2E, batch: Any) -> list[Any]:
    """A batch as values of the placeholders."""
    args, kwargs = split(copy.deepcopy(batch))
    return host.flatten(host.signature.bind(*args, **kwargs))


# --- readers; a call of a weighted operator has the same name before and after conversion


def operator(node: fx.Node) -> str:
    """Name of an operator without its overload."""
    return str(node.target).split(".")[-2 if isinstance(node.target, torch._ops.OpOverload) else -1]


def weighted_calls(model: fx.GraphModule) -> list[fx.Node]:
    """The linear layers and convolutions of a graph."""
    return [node for node in model.graph.nodes if node.op == "call_function" and operator(node) in WEIGHTED]


def bias_node(node: fx.Node) -> fx.Node | None:
    """The bias of a call."""
    found = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    assert found is None or isinstance(found, fx.Node)
    return found


def attribute(model: nn.Module, node: fx.Node) -> Tensor:
    """The value of a `get_attr` node."""
    path, _, leaf = str(node.target).rpartition(".")
    return getattr(model.get_submodule(path), leaf).detach()


def is_observer(module: nn.Module) -> bool:
    """Whether a module is an observer or fake-quantizer of torchao."""
    return isinstance(module, ObserverBase | FakeQuantizeBase | AffineQuantizedObserverBase)


def _parameter(model: fx.GraphModule, node: fx.Node) -> tuple[Tensor | None, list[nn.Module]]:
    """The parameter behind observers (None where the value is computed), and the observers."""
    observers = []
    while node.op == "call_module":
        observers.append(model.get_submodule(str(node.target)))
        node = node.args[0]
    return (attribute(model, node) if node.op == "get_attr" else None), observers


def all_learned(result: fx.GraphModule) -> dict[str, Quantized]:
    """What `adaround` left in a prepared model, by call; quantized weights must lie on their frozen observer's grid."""
    found = {}
    for node in weighted_calls(result):
        weight, observers = _parameter(result, node.args[1])
        if weight is None or not observers:
            continue
        # what compilers and files take for granted
        assert weight.is_contiguous(), node
        observer = observers[0]
        assert isinstance(observer, FrozenMixin), f"{node}: {type(observer)}"
        assert len(observers) == 1
        scale, zero_point = observer.calculate_qparams()
        per_channel = observer.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
        axis = observer.ch_axis if per_channel else None
        view = [1] * weight.dim()
        if axis is not None:
            view[axis] = -1
        integers = (weight.double() / scale.double().view(view) + zero_point.view(view)).round().long()
        assert int(integers.min()) >= observer.quant_min
        assert int(integers.max()) <= observer.quant_max
        source = bias_node(node)
        bias = None if source is None else _parameter(result, source)[0]
        one = Quantized(integers, scale, zero_point.long(), axis, bias)
        # on the grid, to the last bit
        assert torch.equal(one.dequantize(), weight)
        found[node.name] = one
    return found


def value_of(model: fx.GraphModule, node: Any) -> Any:
    """The value of a node that depends on parameters only, made by the host's own operators."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        return attribute(model, node)
    assert node.op == "call_function", node
    return node.target(*(value_of(model, arg) for arg in node.args), **node.kwargs)


def all_converted(model: fx.GraphModule) -> dict[str, Quantized]:
    """What a converted program holds, by call: operators whose weight is dequantized from integers."""
    found = {}
    for node in weighted_calls(model):
        weight = node.args[1]
        if not operator(weight).startswith("dequantize"):
            continue
        values = [value_of(model, arg) for arg in weight.args]
        assert values[0].dtype == torch.int8
        bias = bias_node(node)
        found[node.name] = Quantized(
            values[0].long(),
            torch.as_tensor(values[1]).reshape(-1),
            torch.as_tensor(values[2]).reshape(-1).long(),
            values[3] if "per_channel" in operator(weight) else None,
            None if bias is None else value_of(model, bias),
        )
    return found


def call_of(model: fx.GraphModule, parameter: str) -> str:
    """Name of the call that reads the weight `parameter`, or of the last one that does."""
    names = [node.name for node in weighted_calls(model) if _source(node.args[1]) == parameter]
    assert names, f"nothing reads {parameter!r}"
    return names[-1]


def _source(node: fx.Node) -> str:
    while node.op != "get_attr":
        node = node.args[0]
    return str(node.target)


# --- what must not change


def observer_statistics(model: fx.GraphModule) -> dict[str, Tensor]:
    """The statistics of the host's own observers."""
    return {
        f"{name}.{key}": value.clone()
        for name, module in model.named_modules()
        if is_observer(module)
        for key, value in module.state_dict().items()
    }


class Unchanged:
    """Remembers a prepared model and checks later that it is as it was: values, observers, code, notes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before = self._look()

    def _look(self) -> dict[str, Any]:
        modules = {name: id(module) for name, module in self.model.named_modules()}
        found = {"modules": modules, "code": str(getattr(self.model, "code", "")), "meta": set(vars(self.model))}
        for name, value in self.model.state_dict(keep_vars=True).items():
            found[name] = (id(value), value.detach().clone())
        meta = getattr(self.model, "meta", None)
        return {**found, "notes": None if meta is None else set(meta)}

    def check(self) -> None:
        after = self._look()
        assert after.keys() == self.before.keys()
        for name, value in self.before.items():
            if isinstance(value, tuple):
                assert after[name][0] == value[0], name
                torch.testing.assert_close(after[name][1], value[1], rtol=0, atol=0, equal_nan=True, msg=name)
            else:
                assert after[name] == value, name
