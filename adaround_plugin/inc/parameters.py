"""The parameters of `AdaRoundConfig`: those of a layer, and those of the pass, read off the fields of `LayerWise`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, Union, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.files import check_folder
from adaround_plugin.inc.compat import DEFAULT_WHITE_LIST
from adaround_plugin.learning.layerwise import LayerWise
from adaround_plugin.learning.methods import METHODS, Preset, get_preset
from adaround_plugin.options import check_seed
from adaround_plugin.solvers import SOLVERS

__all__ = ["LAYER_PARAMETERS", "PARAMETERS", "PASS_PARAMETERS", "check", "method_of", "signature"]


def _tunable(hint: Any, *others: Any) -> Any:
    """A hint that also takes a list of values, which autotune tries; `others` stand by themselves."""
    listed: Any = Annotated[list[hint], Field(min_length=1)]
    return Union[hint, listed, *others]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the configuration.

    Attributes:
        name, default: of it.
        hint: the values that it takes.
    """

    name: str
    default: Any
    hint: Any


# what a layer may have for itself; all others hold for the whole pass
LAYER_PARAMETERS = [
    Parameter("dtype", "int", _tunable(Literal["int", "fp32"])),
    Parameter("bits", 4, _tunable(Annotated[int, Field(ge=2, le=8)])),
    Parameter("use_sym", True, _tunable(bool)),
    Parameter("w_granularity", "per_channel", _tunable(Literal["per_channel", "per_tensor"])),
    Parameter("group_size", -1, _tunable(Literal[-1] | Annotated[int, Field(ge=1)])),
]


def _one_of(names: Iterable[str]) -> Any:
    """The hint of a choice."""
    return Literal.__getitem__(tuple(names))


def _options() -> Iterator[Parameter]:
    """The fields of `LayerWise`; None is what the method has."""
    hints = {**get_type_hints(LayerWise), "solver": _one_of(SOLVERS)}
    for field in fields(LayerWise):
        yield Parameter(field.name, None, _tunable(hints[field.name], None))


PASS_PARAMETERS = [
    Parameter("act_dtype", "uint8", _tunable(Literal["uint8", "fp32"])),
    Parameter("method", "default", _tunable(_one_of(METHODS))),
    *_options(),
    Parameter("finetune", None, _tunable(bool, None)),
    Parameter("token_mask", None, _tunable(str, None)),
    Parameter("blocks", None, _tunable(str, None)),
    Parameter("model_path", None, str | None),
    Parameter("quant_lm_head", True, _tunable(bool)),
    Parameter("seed", 0, _tunable(int)),
    Parameter("checkpoint", None, str | None),
]
PARAMETERS = [*LAYER_PARAMETERS, *PASS_PARAMETERS]
_WHITE_LIST = Parameter("white_list", DEFAULT_WHITE_LIST, list[str | type[nn.Module]] | Literal["*"] | None)
_ADAPTERS = {one.name: TypeAdapter(one.hint) for one in (*PARAMETERS, _WHITE_LIST)}


def signature() -> inspect.Signature:
    """That of the configuration's constructor."""
    kinds = inspect.Parameter
    named = [
        kinds(one.name, kinds.KEYWORD_ONLY, default=one.default, annotation=one.hint)
        for one in (*PARAMETERS, _WHITE_LIST)
    ]
    own = kinds("self", kinds.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([own, *named, kinds("kwargs", kinds.VAR_KEYWORD, annotation=Any)])


def check(name: str, value: Any) -> Any:
    """`value`, if the parameter takes it; values of names that are no parameters pass.

    Raises:
        InvalidOptionError: it does not.
    """
    if name not in _ADAPTERS:
        return value
    try:
        _ADAPTERS[name].validate_python(value, strict=True)
    except ValidationError as error:
        reasons = [
            detail["msg"] for detail in error.errors() if isinstance(value, list) or detail["type"] != "list_type"
        ]
        raise InvalidOptionError(
            name, f"{value!r} is not accepted", f"{' or '.join(dict.fromkeys(reasons))}."
        ) from None
    if name in {field.name for field in fields(LayerWise)} and value is not None:
        for one in value if isinstance(value, list) else [value]:
            LayerWise(**{name: one})
    if name == "checkpoint" and value is not None:
        check_folder(name, value)
    if name == "seed":
        for one in value if isinstance(value, list) else [value]:
            check_seed("seed", one)
    return value


def method_of(part: Any) -> tuple[str | Preset, bool | None]:
    """The arguments `method` and `finetune` of `adaround` that a part of a configuration asks for.

    Raises:
        InvalidOptionError: the method has no place for an option that is given.
    """
    given = {field.name: getattr(part, field.name) for field in fields(LayerWise)}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return part.method, part.finetune
    preset = get_preset(part.method)
    layers = replace(preset.method.layers, **given)
    try:
        return replace(preset, method=preset.method.with_layers(layers)), part.finetune
    except InvalidOptionError:
        raise InvalidOptionError(
            "method",
            f"{part.method!r} says itself how layers are decided, but so do {sorted(given)}",
            "Leave them out, or pass another method.",
        ) from None
