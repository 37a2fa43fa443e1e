"""Ways to run a network on servers and PCs: torch, Inductor, ONNX Runtime, OpenVINO.

Every path takes batches of one size, and as many threads as torch has when it is made. OpenVINO is a wheel of its own
(`NEEDS`), imported where its paths are made.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, fx, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch._inductor import config as inductor_config
from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

from adaround_plugin.deployment.onnx_translations import get_onnx_translations
from adaround_plugin.deployment.onnx_weights import pack_onnx_weights

__all__ = ["NEEDS", "RUNTIMES", "Model", "Run", "ServerPath", "packed_integers", "same_integers"]

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Model:
    """A network that is to run.

    Attributes:
        name: as the table and its files call it.
        program: the float network, or the converted program.
        bits: of its weights.
        expected: the learned integers; None for a float network.
        example: a batch.
        folder: where its files go.
    """

    name: str
    program: nn.Module
    bits: int
    expected: list[Tensor] | None
    example: Tensor
    folder: Path

    def export(self) -> torch.export.ExportedProgram:
        """The program for batches of the example's size."""
        return torch.export.export(self.program, (self.example,), strict=True)

    @functools.cached_property
    def onnx_models(self) -> dict[str, onnx.ModelProto]:
        """In ONNX: as exported, and with 4 bits or fewer packed."""
        table = get_onnx_translations()
        result = torch.onnx.export(
            self.export(), dynamo=True, verbose=False, opset_version=21, custom_translation_table=table
        )
        assert result is not None
        models = {"": result.model_proto}
        if self.bits <= 4:
            models[", INT4"] = pack_onnx_weights(result.model_proto)
            models[", INT4 in memory"] = pack_onnx_weights(result.model_proto, cast=False)
        return models


@dataclass(frozen=True)
class ServerPath:
    """One way to run a model.

    Attributes:
        name: of the runtime, and how it got the model.
        model: what it runs.
        run: the model in it.
        stored: bytes of the file that is loaded; None without one.
        integers: what it holds in the place of weights; None where that cannot be read.
    """

    name: str
    model: Model
    run: Run
    stored: int | None = None
    integers: list[Tensor] | None = None

    @property
    def exact(self) -> bool | None:
        """Whether it holds the learned integers; None where that cannot be read."""
        if self.integers is None or self.model.expected is None:
            return None
        return same_integers(self.integers, self.model.expected)


def same_integers(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two lists hold the same weights, in any order: which is where, outputs tell."""
    one, other = (
        Counter((tuple(weight.shape), tuple(weight.long().flatten().tolist())) for weight in weights)
        for weights in (found, expected)
    )
    return one == other


# --- torch and Inductor


def _torch(model: Model) -> Iterator[ServerPath]:
    yield ServerPath("torch", model, model.program)


def packed_integers(lowered: nn.Module) -> list[Tensor]:
    """The integers that oneDNN's kernels of a lowered program read; matrices lie transposed there."""
    plain = [buffer.to_dense() for buffer in lowered.buffers() if buffer.is_mkldnn]
    return [weight.t() if weight.dim() == 2 else weight for weight in plain]


def _inductor(model: Model) -> Iterator[ServerPath]:
    if model.expected is not None:
        assert isinstance(model.program, fx.GraphModule)
        with torch.no_grad():
            lowered = lower_pt2e_quantized_to_x86(model.program, (model.example,))
        yield ServerPath("lower_pt2e_quantized_to_x86", model, lowered, integers=packed_integers(lowered))
    file = str(model.folder / f"{model.name}.pt2")
    with torch.no_grad():
        aoti_compile_and_package(model.export(), package_path=file, inductor_configs={"freezing": True})
    yield ServerPath("torch.compile", model, functools.partial(_run_frozen, torch.compile(model.program)))
    yield ServerPath("AOTInductor", model, aoti_load_package(file), Path(file).stat().st_size)


def _run_frozen(compiled: Run, batch: Tensor) -> Tensor:
    """What is compiled is forgotten when another program is exported, and then compiled again as is set at the call."""
    with torch.no_grad(), inductor_config.patch(freezing=True):
        return compiled(batch)


# --- ONNX


def _onnx_runtime(model: Model) -> Iterator[ServerPath]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for how, proto in model.onnx_models.items():
        data = proto.SerializeToString()
        run = functools.partial(_run_session, onnxruntime.InferenceSession(data, options))
        constants = [one for one in proto.graph.initializer if len(one.dims) > 1 and one.data_type != TensorProto.FLOAT]
        integers = [torch.from_numpy(numpy_helper.to_array(one).astype("int8")) for one in constants]
        yield ServerPath(f"ONNX Runtime{how}", model, run, len(data), integers)


def _run_session(session: Any, batch: Tensor) -> Tensor:
    (result,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    return torch.from_numpy(result)


def _openvino(model: Model) -> Iterator[ServerPath]:
    import openvino

    core = openvino.Core()
    # OpenVINO's own choice is bfloat16 where the processor has it
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    for how, proto in model.onnx_models.items():
        data = proto.SerializeToString()
        read = core.read_model(data)
        constants = [one for one in read.get_ops() if one.get_type_name() == "Constant"]
        integers = []
        for one in constants:
            kind, shape = one.get_element_type(), one.get_output_shape(0)
            if len(shape) > 1 and kind.is_integral():
                stored = torch.from_numpy(one.data.copy())
                integers.append(_unpacked(stored, list(shape)) if kind.bitwidth == 4 else stored)
        run = functools.partial(_run_compiled, core.compile_model(read, "CPU", options))
        yield ServerPath(f"OpenVINO{how}", model, run, len(data), integers)


def _unpacked(packed: Tensor, shape: list[int]) -> Tensor:
    """Signed integers of 4 bits, two in a byte, the lower half first."""
    unsigned = packed.view(torch.uint8).flatten()
    halves = torch.stack([unsigned & 15, unsigned >> 4], 1).flatten()[: math.prod(shape)].view(torch.int8)
    return ((halves ^ 8) - 8).reshape(shape)


def _run_compiled(compiled: Any, batch: Tensor) -> Tensor:
    return torch.from_numpy(compiled(batch.numpy())[0].copy())


RUNTIMES: Final[dict[str, Callable[[Model], Iterator[ServerPath]]]] = {
    "torch": _torch,
    "inductor": _inductor,
    "onnxruntime": _onnx_runtime,
    "openvino": _openvino,
}
# beside the extra `test`
NEEDS: Final = {"openvino": "pip install openvino"}
