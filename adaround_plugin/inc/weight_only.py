"""An eager model to one with Neural Compressor's packed linear layers: weights quantized, activations in float."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer as ProgramQuantizer

from adaround_plugin.api import adaround
from adaround_plugin.deployment.folded import check_unfolded
from adaround_plugin.digests import digest
from adaround_plugin.errors import InvalidModelError, InvalidOptionError
from adaround_plugin.hosts.open import open_host
from adaround_plugin.inc.compat import Quantizer
from adaround_plugin.inc.layers import weighted_layers
from adaround_plugin.inc.packing import IntegerLinear, pack
from adaround_plugin.inc.parts import ROOT, Parts, blocks_of, model_path_of, pass_options
from adaround_plugin.inc.programs import integer_linears, weight_only_quantizer
from adaround_plugin.inc.recording import Batch, Recording
from adaround_plugin.report import Report, get_report, set_report
from adaround_plugin.sequential.inputs import copied
from adaround_plugin.sequential.learning import INSIDE, find_blocks, learned_blocks, together
from adaround_plugin.sequential.programs import Call, exported
from adaround_plugin.sequential.weights import StoredWeights, stored_weights

__all__ = ["WeightOnlyQuantizer"]


class WeightOnlyQuantizer(Quantizer):
    """Inputs recorded, the model exported, `adaround` on the program, the integers packed into the eager model.

    Args:
        quant_config: the part of the configuration for each layer, as `AdaRoundConfig.to_config_mapping` gives it.
    """

    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Prepare, calibrate and convert; `model` records no more, whatever comes of it."""
        try:
            return super().quantize(model, *args, **kwargs)
        finally:
            Recording.stop(model)

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """`model` itself, recording its inputs; what it has on the device `meta` is there while it runs.

        Raises:
            InvalidModelError: it is in train mode, or in another dtype than float32, the only one of packed layers.
            InvalidOptionError: affine weights of 8 bits, which INC's packed layers get wrong, or as `stored_weights`.
        """
        if any(part.bits == 8 and not part.use_sym and part.dtype != "fp32" for part in self.quant_config.values()):
            raise InvalidOptionError("use_sym", "INC's packed layers overflow at 8 bits", "Pass use_sym=True.")
        if model.training:
            raise InvalidModelError("model", "is in train mode", "Call .eval() first.")
        real = (parameter for parameter in model.parameters() if not parameter.is_meta)
        dtypes = {parameter.dtype for parameter in real if parameter.is_floating_point()}
        if others := dtypes - {torch.float32}:
            raise InvalidModelError(
                "model", f"is in {others.pop()}, and INC's packed layers give float32", "Call .float() first."
            )
        blocks, stored = blocks_of(self.quant_config), _stored(model, self.quant_config)
        handles = [] if stored is None or blocks is None else stored.lend(model, blocks, find_blocks(model, blocks))
        Recording(weighted_layers(model, linear_only=True), handles=handles).start(model)
        return model

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """`model` with packed linear layers; `get_report` reads its report.

        Raises:
            InvalidModelError: `prepare` did not make this model, torch.export fails on it, or a layer took in a batch
                norm.
            InvalidBatchError: no data went through it.
        """
        # functional calls cannot be packed
        parts = {layer: part for layer, part in self.quant_config.items() if layer != ROOT}
        blocks, options = blocks_of(self.quant_config), pass_options(self.quant_config)
        with Recording.taken(model) as batches:
            stored = _stored(model, self.quant_config)
            if blocks is None:
                linears, report = _as_a_whole(model, batches, parts, options)
            else:
                linears, report = _by_blocks(model, batches, parts, blocks, {"weights": stored, **options})
        packed = pack(model, linears)
        if stored is not None:
            stored.fill(packed)
        set_report(packed, report)
        return packed


def _stored(model: nn.Module, parts: Parts) -> StoredWeights | None:
    """The weights that the model has on the device `meta`, in the dtype that packed layers need."""
    return stored_weights(model, model_path_of(parts), "model_path", torch.float32)


def _as_a_whole(
    model: nn.Module, batches: list[Batch], parts: Parts, options: dict[str, Any]
) -> tuple[dict[str, IntegerLinear], Report]:
    """What is learned of the whole model, by layer name."""
    program = exported(model, [_call(batch) for batch in batches])
    prepared = prepare_pt2e(program, weight_only_quantizer(program, parts))
    with torch.no_grad():
        # weight observers see their weights; the model may write to its inputs
        args, kwargs = _call(copied(batches[0]))
        prepared(*args, **kwargs)
    check_unfolded(model, prepared, {node.name: digest(node.weight) for node in open_host(prepared).nodes})
    learned = adaround(prepared, batches, **options)
    return integer_linears(learned, parts), get_report(learned)


def _by_blocks(
    model: nn.Module, batches: list[Batch], parts: Parts, blocks: str, options: dict[str, Any]
) -> tuple[dict[str, IntegerLinear], Report]:
    """What is learned of its blocks, one after the other; integers are kept in a byte each."""
    linears: dict[str, IntegerLinear] = {}
    reports: list[Report] = []

    def inside(block: str) -> Parts:
        """The parts of a block's layers, by their names in its program."""
        start = f"{block}."
        return {
            (INSIDE + name.removeprefix(start), kind): part
            for (name, kind), part in parts.items()
            if name.startswith(start)
        }

    def quantizer(block: str, program: fx.GraphModule) -> ProgramQuantizer:
        return weight_only_quantizer(program, inside(block))

    for one in learned_blocks(model, batches, blocks, quantizer, **options):
        if one.program is not None:
            check_unfolded(one.paired, one.program, get_report(one.program).weights)
            for name, linear in integer_linears(one.program, inside(one.name)).items():
                linears[one.outside(name)] = replace(linear, integers=linear.integers.to(torch.int8))
        reports.append(one.report)
    report = together(reports)
    outside = [
        (name, kind, f"outside of {blocks}: left in float")
        for (name, kind), part in parts.items()
        if part.dtype != "fp32" and not name.startswith(f"{blocks}.")
    ]
    return linears, replace(report, skipped=[*report.skipped, *outside])


def _call(batch: Batch) -> Call:
    """A batch as positional and keyword arguments."""
    return ((), batch) if isinstance(batch, dict) else (batch, {})
