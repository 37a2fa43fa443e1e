"""What `prepare` leaves in a model for `convert`: the parts of the configuration and the calibration data it sees."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from torch import fx, nn

from adaround_plugin.errors import InvalidBatchError, InvalidModelError
from adaround_plugin.sequential.inputs import copied
from adaround_plugin.sequential.weights import Handle

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
    handles: list[Handle] = field(default_factory=list)

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
    @contextmanager
    def taken(cls, model: nn.Module) -> Iterator[list[Batch]]:
        """The batches, taken out of `model`, which records no more; put back where what is done inside fails.

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
        try:
            yield recording.batches
        except BaseException:
            _place(model)[_KEY] = recording
            raise

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.batches.append(copied(_by_name(model, args, kwargs) if kwargs else args))


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the parameters of `forward`.

    Raises:
        InvalidBatchError: some have none.
    """
    signature = inspect.signature(model.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL and named.get(parameter.name):
            raise InvalidBatchError(
                "run_fn",
                f"passes the model both inputs by name and inputs that its forward takes as *{parameter.name}",
                "Pass all by name, or all by position.",
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def _place(model: nn.Module) -> dict[str, Any]:
    """Where a model keeps what a deep copy takes along: attributes, but of a GraphModule only `meta`."""
    return model.meta if isinstance(model, fx.GraphModule) else vars(model)
