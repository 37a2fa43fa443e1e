"""AdaRound's weight observer in the annotations of any vendor's quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase
from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer

from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.graph.arguments import argument
from adaround_plugin.hosts.grids import observed_spec
from adaround_plugin.hosts.pt2e.compat import new_observer
from adaround_plugin.hosts.pt2e.layer_options import LayerOptions, check_layers, is_body, layer_names, options_by_name
from adaround_plugin.hosts.pt2e.observers import AdaRoundObserver
from adaround_plugin.hosts.weight_observers import check_weight_grid
from adaround_plugin.options import check_choice
from adaround_plugin.rounding.grid import GridSpec, check_bits, integer_range

__all__ = ["AdaRoundQuantizer"]


class AdaRoundQuantizer(Quantizer):
    """A vendor's quantizer, with AdaRound's observer on the weights of linear layers and convolutions.

    Everything else stays as the vendor has it: which operators are quantized, activations, biases, and of the weights
    the scheme, the channel axis and the storage type.

    Args:
        quantizer: the vendor's, configured.
        weight_bits: 2 to 8, as many as the vendor's own range has at most; None for the vendor's own range.
        layers: for layers by qualified name, name of a parent, or regular expression, the options that differ, such as
            `{"head": {"weight_bits": 8}}`; None leaves a layer its vendor's observer. The last entry that matches
            counts.
        scale: the observer's own choice of scale, `"mse"` or `"minmax"`.

    Raises:
        InvalidOptionError: an argument is out of range. At `prepare_pt2e`: a name in `layers` matches no weight that
            the quantizer annotates, or the vendor's range has fewer bits.
        InvalidModelError: at `prepare_pt2e`, the quantizer annotates no weight, or one without one scale per tensor or
            channel in int8.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        weight_bits: int | None = None,
        layers: LayerOptions | None = None,
        scale: Literal["mse", "minmax"] = "mse",
    ) -> None:
        super().__init__()
        if not isinstance(quantizer, Quantizer):
            kind = quantizer.__name__ if isinstance(quantizer, type) else type(quantizer).__name__
            raise InvalidOptionError(
                "quantizer", f"{kind} is no object of torchao's class Quantizer", "Pass the vendor's quantizer."
            )
        self.options = {"weight_bits": weight_bits, "scale": scale}
        _check_options(self.options)
        self.quantizer, self.layers = quantizer, check_layers(layers, _check_options)

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Called by `prepare_pt2e`: the vendor's own."""
        transformed: fx.GraphModule = self.quantizer.transform_for_annotation(model)
        return transformed

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Called by `prepare_pt2e`: the vendor's annotations, with other observers for the weights."""
        annotated: fx.GraphModule = self.quantizer.annotate(model)
        found = {}
        for call, name in layer_names(annotated).items():
            annotation = call.meta.get("quantization_annotation")
            inputs = {} if annotation is None else annotation.input_qspec_map
            spec = inputs.get(argument(call, 1, "weight"))
            # a weight that shares another's specification follows it
            if isinstance(spec, QuantizationSpec):
                found[call] = (name, inputs, spec)
        if not found and not is_body(annotated):
            raise InvalidModelError(
                type(self.quantizer).__name__,
                "annotates no weight of a linear layer or convolution in this program",
                "Configure it (set_global or its like), and export with strict=True.",
            )
        options = options_by_name(annotated, (name for name, _, _ in found.values()), self.options, self.layers)
        # one object for equal weights of a name: calls that share a parameter share its observer
        made: dict[tuple[str, QuantizationSpec], QuantizationSpec] = {}
        for name, _, spec in found.values():
            given = options[name]
            if given is not None and (name, spec) not in made:
                made[name, spec] = self._marked(name, spec, **given)
        for call, (name, inputs, spec) in found.items():
            inputs[argument(call, 1, "weight")] = made.get((name, spec), spec)
        return annotated

    def validate(self, model: fx.GraphModule) -> None:
        """Called by `prepare_pt2e`: the vendor's own."""
        self.quantizer.validate(model)

    def prepare_obs_or_fq_callback(self, model: fx.GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        """Called by `prepare_pt2e`: the vendor's own."""
        self.quantizer.prepare_obs_or_fq_callback(model, edge_or_node_to_obs_or_fq)

    def _marked(
        self, name: str, spec: QuantizationSpec, *, weight_bits: int | None, scale: Literal["mse", "minmax"]
    ) -> QuantizationSpec:
        """The specification of a weight, with AdaRound's observer."""
        grid = self._grid(name, new_observer(spec))
        low, high = grid.quant_min, grid.quant_max
        if weight_bits is not None:
            least, most = integer_range(weight_bits)
            # symmetric ranges of backends leave the lowest integer out
            if low > least + 1 or high < most:
                raise InvalidOptionError(
                    "weight_bits",
                    f"{type(self.quantizer).__name__} gives layer {name!r} the range [{low}, {high}], "
                    f"which has no {weight_bits} bits",
                    "Configure it for more bits, or pass fewer.",
                )
            low, high = max(low, least), min(high, most)
        observer = AdaRoundObserver.with_args(ch_axis=grid.ch_axis or 0, scale=scale)
        return replace(spec, quant_min=low, quant_max=high, observer_or_fake_quant_ctr=observer)

    def _grid(self, name: str, observer: nn.Module) -> GridSpec:
        """The grid that the vendor's observer of a weight asks for."""
        problem = None
        if not isinstance(observer, ObserverBase | FakeQuantizeBase) or not hasattr(observer, "qscheme"):
            problem = f"by {type(observer).__name__}, which has no per-tensor or per-channel scale"
        elif observer.dtype != torch.int8:
            problem = f"to {observer.dtype}, not to torch.int8"
        if problem is not None:
            raise InvalidModelError(
                f"layer {name!r}",
                f"its weight is quantized by {type(self.quantizer).__name__} {problem}",
                f"Configure another type of weights, or keep the quantizer's observer with layers={{{name!r}: None}}.",
            )
        return observed_spec(observer)


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise `InvalidOptionError` unless these are options of an `AdaRoundQuantizer`."""
    for name in options:
        check_choice("options", name, ("weight_bits", "scale"))
    if options.get("weight_bits") is not None:
        check_bits(options["weight_bits"], "weight_bits")
    check_weight_grid(0, options.get("scale", "mse"), torch.float32)
