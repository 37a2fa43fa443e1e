"""From a model to a saved program, by the PT2E flow of torchao."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from adaround_plugin.deployment.ranges import widen_weight_ranges
from adaround_plugin.errors import InvalidBatchError, InvalidModelError, MissingDependencyError, told_as
from adaround_plugin.files import write_whole
from adaround_plugin.hosts.open import is_exported
from adaround_plugin.hosts.pt2e import (
    AdaRoundQuantizer,
    AdaRoundWeightOnlyQuantizer,
    get_adaround_x86_inductor_config,
)
from adaround_plugin.hosts.pt2e.exports import strictly_exported

try:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import Quantizer
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer
except ImportError as error:
    raise MissingDependencyError.of("torchao", "pt2e", error) from error

__all__ = ["BACKENDS", "Flow"]

Layers = Mapping[str, Mapping[str, int]]


def _weights(bits: int, layers: Layers) -> Quantizer:
    return AdaRoundWeightOnlyQuantizer(layers, weight_bits=bits)


def _x86(bits: int, layers: Layers) -> Quantizer:
    vendor = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(8))
    return AdaRoundQuantizer(vendor, bits, layers)


def _xnnpack(bits: int, layers: Layers) -> Quantizer:
    try:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
    except ImportError as error:
        raise MissingDependencyError.of("executorch", "executorch", error) from error
    vendor = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    return AdaRoundQuantizer(vendor, bits, layers)


_XNNPACK = "xnnpack"
# by name, the quantizer for weights of so many bits, with options for single layers
BACKENDS: Mapping[str, Callable[[int, Layers], Quantizer]] = {"weights": _weights, "x86": _x86, _XNNPACK: _xnnpack}


@dataclass(frozen=True)
class Flow:
    """A model, its data, and what it is quantized for.

    Attributes:
        model: makes the model anew; an exported program is taken as it is.
        batches: as `adaround` takes them.
        backend: a name of `BACKENDS`.
    """

    model: Callable[[], nn.Module]
    batches: list[Any]
    backend: str

    @property
    def symmetric(self) -> bool | None:
        """Whether weights are symmetric; None for what is more accurate at each width."""
        return None if self.backend == "weights" else True

    @property
    def integer_biases(self) -> bool:
        """Whether the backend adds biases as integers."""
        return self.backend == _XNNPACK

    def prepared(self, bits: int, layers: Layers) -> fx.GraphModule:
        """The program with observers, calibrated.

        Raises:
            InvalidModelError: the model cannot be exported.
            InvalidBatchError: there are no batches, or one does not fit the model.
        """
        if not self.batches:
            raise InvalidBatchError("--data", "has no batches", "Pass some.")
        model = self.model()
        program = model if is_exported(model) else self._exported(model.eval())
        prepared: fx.GraphModule = prepare_pt2e(program, BACKENDS[self.backend](bits, layers))
        for number, batch in enumerate(self.batches):
            _calibrate(prepared, batch, number)
        return prepared

    def save(self, learned: fx.GraphModule, path: Path) -> None:
        """Convert what was learned, and write it as a program that `torch.export.load` reads; all or nothing.

        Weights declare ranges that the backend has.
        """
        converted = convert_pt2e(learned)
        if self.backend == _XNNPACK:
            converted = widen_weight_ranges(converted, linear_bits=4)
        buffer = io.BytesIO()
        torch.export.save(self._program(converted), buffer)
        write_whole(path, buffer.getbuffer())

    def _exported(self, model: nn.Module) -> fx.GraphModule:
        for number, batch in enumerate(self.batches):
            args, kwargs = _arguments(batch)
            try:
                inspect.signature(model.forward).bind(*args, **kwargs)
            except TypeError as error:
                raise InvalidBatchError(
                    f"--data: batch {number}", f"does not fit the model's inputs ({error})", "Leave labels out."
                ) from None
        with told_as(_not_exported):
            module = self._program(model).module()
        assert isinstance(module, fx.GraphModule)
        return module

    def _program(self, model: nn.Module) -> torch.export.ExportedProgram:
        """The export, for any number of samples where the model allows it, and a batch has more than one."""
        args, kwargs = _arguments(max(self.batches, key=_length))
        shapes = [{0: Dim.AUTO} if isinstance(one, Tensor) and one.dim() else None for one in [*args, *kwargs.values()]]
        named = dict(zip(kwargs, shapes[len(args) :], strict=True))
        dynamic: Any = named if kwargs else tuple(shapes)
        return strictly_exported(model, args, kwargs, dynamic)


def _not_exported(error: Exception) -> InvalidModelError:
    first = str(error).strip().partition("\n")[0]
    problem = f"torch.export cannot export it ({type(error).__name__}: {first})"
    return InvalidModelError("model", problem, "Export it yourself, and pass the .pt2 file.")


def _calibrate(prepared: fx.GraphModule, batch: Any, number: int) -> None:
    """Let the observers see a batch."""
    args, kwargs = _arguments(copy.deepcopy(batch))

    def misfit(error: Exception) -> InvalidBatchError:
        return InvalidBatchError(
            f"--data: batch {number}",
            f"does not fit the model ({type(error).__name__}: {error})",
            "Pass what it takes; a program that was exported for one batch size takes that size alone (--batch-size).",
        )

    with told_as(misfit), torch.no_grad():
        prepared(*args, **kwargs)


def _length(batch: Any) -> int:
    """The number of samples in a batch, as its first tensor has them."""
    args, kwargs = _arguments(batch)
    return next((len(one) for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.dim()), 0)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}
