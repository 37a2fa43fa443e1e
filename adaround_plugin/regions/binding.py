"""What a loader yields, fitted to the model's signature and checked."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaround_plugin.errors import InvalidBatchError, InvalidOptionError
from adaround_plugin.graph.memory import Memory
from adaround_plugin.regions.batches import Batches, input_tensors, read_batches

__all__ = ["bind_batches"]

_log = logging.getLogger(__name__)


def bind_batches(
    model: nn.Module,
    signature: inspect.Signature,
    flatten: Callable[[inspect.BoundArguments], list[Any]],
    batches: Iterable[Any],
    inputs: Callable[[Any], Any] | None,
    argument: str = "data",
    memory: Memory | None = None,
) -> Batches:
    """The arguments of every batch, as the model's graph takes them.

    Args:
        model: whose parameters say on which device batches must lie, if all of them lie on one.
        signature: its inputs.
        flatten: from bound arguments to the values of the graph's placeholders; raises `ValueError` on a misfit.
        batches: a DataLoader, a list, any iterable; a list stays where it is.
        inputs: maps a batch to the model's inputs, for example `lambda batch: batch[0]` to drop labels.
        argument: what the caller calls the batches, for errors.
        memory: where batches are kept that a loader or `inputs` makes; None keeps all of them in memory.

    Raises:
        InvalidBatchError: no batches, or a batch that does not fit the signature, or lies on another device.
        InvalidOptionError: `inputs` cannot be called.
    """
    if inputs is not None and not callable(inputs):
        raise InvalidOptionError("inputs", f"{inputs!r} is not callable", "Pass a function of one batch.")
    if isinstance(batches, Tensor | Mapping | str):
        raise InvalidBatchError(
            argument, f"is one {type(batches).__name__}, not a sequence of batches", "Pass [batch] instead."
        )
    if not isinstance(batches, Iterable) and not hasattr(type(batches), "__getitem__"):
        raise InvalidBatchError(
            argument, f"{type(batches).__name__} is not iterable", "Pass a DataLoader or a list of batches."
        )
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None

    def bind(batch: Any, number: int) -> list[Any]:
        return _bind(device, signature, flatten, batch, inputs, number)

    owned = inputs is not None or not isinstance(batches, Sequence)
    bound = read_batches(batches, bind, memory or Memory(), owned=owned)
    if not bound:
        raise InvalidBatchError(
            argument, "has no batches (perhaps an iterator that was already used up)", "Pass a list or a DataLoader."
        )
    _log.debug("%d calibration batches", len(bound))
    return bound


def _bind(
    device: torch.device | None,
    signature: inspect.Signature,
    flatten: Callable[[inspect.BoundArguments], list[Any]],
    batch: Any,
    inputs: Callable[[Any], Any] | None,
    index: int,
) -> list[Any]:
    given = inputs(batch) if inputs is not None else batch
    args = tuple(given) if isinstance(given, tuple | list) else () if isinstance(given, Mapping) else (given,)
    kwargs = dict(given) if isinstance(given, Mapping) else {}
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        shown = list(kwargs) if kwargs else [type(arg).__name__ for arg in args]
        raise InvalidBatchError(
            f"batch {index}",
            f"{shown} does not fit the model's inputs {list(signature.parameters)} ({error})",
            "Pass inputs= to map a batch to the model's inputs, for example inputs=lambda batch: batch[0].",
        ) from None
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if (foreign := _array(value)) is not None:
            raise InvalidBatchError(
                f"batch {index}",
                f"input {name!r} is a {type(foreign).__name__}, not a tensor",
                "Pass inputs= to make tensors, for example inputs=torch.from_numpy.",
            )
        for tensor in input_tensors(value):
            is_float = tensor.is_floating_point()
            # a lone number may come from anywhere; so may indices and lengths, which some operators want elsewhere
            if is_float and tensor.dim() and device not in (None, tensor.device):
                raise InvalidBatchError(
                    f"batch {index}",
                    f"input {name!r} lies on {tensor.device}, the model on {device}",
                    f"Pass inputs= to bring a batch there, for example inputs=lambda batch: batch.to({str(device)!r}).",
                )
            if tensor.is_meta:
                raise InvalidBatchError(
                    f"batch {index}", f"input {name!r} lies on the device meta, without values", "Pass data."
                )
            if not is_float:
                continue
            if tensor.dtype != torch.float32:
                raise InvalidBatchError(f"batch {index}", f"input {name!r} is {tensor.dtype}", "Pass float32.")
            if not torch.isfinite(tensor).all():
                raise InvalidBatchError(f"batch {index}", f"input {name!r} holds NaN or infinity", "Remove the sample.")
    tensors = input_tensors(list(bound.arguments.values()))
    if not tensors or not tensors[0].numel():
        raise InvalidBatchError(f"batch {index}", "holds no data", "Pass batches of at least one sample.")
    try:
        return flatten(bound)
    except ValueError as error:
        raise InvalidBatchError(
            f"batch {index}", f"does not fit the model ({error})", "Pass batches like the example inputs."
        ) from None


def _array(value: Any) -> Any:
    """The first array of numpy in a nested input; None if there is none."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    found = (_array(item) for item in value) if isinstance(value, list | tuple) else ()
    return next((one for one in found if one is not None), None)
