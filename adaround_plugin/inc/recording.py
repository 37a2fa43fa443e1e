"""What `prepare` leaves in a model for `convert`: the parts of the configuration and the calibration data it sees."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from adaround_plugin.errors import InvalidBatchError, InvalidModelError

__all__ = ["Batch", "Layer", "Recording"]

# qualified name and name of the type of a module
Layer = tuple[str, str]

# the inputs of one call: positional, or by name where keywords were used
Batch = tuple[Any, ...] | dict[str, Any]

_KEY = "adaround_recording"


@dataclass
class Recording:
    """A forward pre-hook that keeps the inputs of a prepared model; INC runs a function of the user, not batches.

    Attributes:
        layers: name and type of each layer of the float model. A prepared graph has other names.
        batches: the inputs of each call so far.
        handles: remove the hook, and what else the model has for as long as it records.
    """

    layers: list[Layer]
    batches: list[Batch] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """The recording that `start` put into a model, if any."""
        return _place(model).get(_KEY)

    def start(self, model: nn.Module) -> None:
        """Record the inputs of `model` from now on, in place of a recording that came to nothing."""
        type(self).stop(model)
        _place(model)[_KEY] = self
        self.handles.append(model.register_forward_pre_hook(self, with_kwargs=True))

    @classmethod
    def stop(cls, model: nn.Module) -> Self | None:
        """Let `model` record no more; what it has recorded, if it did."""
        recording: Self | None = _place(model).pop(_KEY, None)
        for handle in recording.handles if recording is not None else ():
            handle.remove()
        return recording

    @classmethod
    def taken(cls, model: nn.Module) -> list[Batch]:
        """The batches, taken out of `model`, which records no more.

        Raises:
            InvalidModelError: nothing was started.
            InvalidBatchError: no data went through the model.
        """
        recording = cls.of(model)
        if recording is None:
            raise InvalidModelError("model", "was not prepared with AdaRoundConfig", "Call prepare first, or quantize.")
        if not recording.batches:
            raise InvalidBatchError(
                "run_fn", "ran no data through the prepared model", "Call the model it is given, once per batch."
            )
        cls.stop(model)
        return recording.batches

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.batches.append(_copied(_by_name(model, args, kwargs) if kwargs else args))


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the parameters of `forward`."""
    signature = inspect.signature(model.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def _place(model: nn.Module) -> dict[str, Any]:
    """Where a model keeps what a deep copy takes along: attributes, but of a GraphModule only `meta`."""
    return model.meta if isinstance(model, fx.GraphModule) else vars(model)


def _copied(value: Any) -> Any:
    """A nested input with its tensors cloned: the caller may reuse a buffer, the model may write to it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value)) if type(value) in (list, tuple) else type(value)(*map(_copied, value))
    return value
