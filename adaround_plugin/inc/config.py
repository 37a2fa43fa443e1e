"""`AdaRoundConfig`: what Neural Compressor's users write, and which part of it applies to which layer."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.inc.compat import (
    DEFAULT_WHITE_LIST,
    FRAMEWORK_NAME,
    GLOBAL,
    LOCAL,
    OperatorConfig,
    SoleConfig,
    register_config,
)
from adaround_plugin.inc.layers import WEIGHTED, Layer, text, weighted_layers
from adaround_plugin.inc.parts import LAYER_SETTINGS, PASS_SETTINGS, resolve

__all__ = ["AdaRoundConfig"]

T = TypeVar("T")
Tunable: TypeAlias = T | Annotated[list[T], Field(min_length=1)]

_PRIORITY = 95  # autotune tries configurations of high priority first; INC's GPTQ has 90
_INTERNAL = {"params_list", "non_tunable_params", "_is_initialized"}  # INC hands these back to constructors


@register_config(framework_name=FRAMEWORK_NAME, algo_name="adaround", priority=_PRIORITY)
class AdaRoundConfig(SoleConfig):
    """Learned rounding, as a configuration of Intel Neural Compressor.

    Every parameter but `white_list` also takes a list of values, which `autotune` tries one by one.

    Args:
        dtype: `"int"`, or `"fp32"` to leave layers in float.
        bits: of the weights, 2 to 8.
        use_sym: zero point 0, else affine.
        w_granularity: one scale `"per_channel"` (of the output) or `"per_tensor"`.
        group_size: entries of a row of a linear layer's weight that share a scale; -1 for whole rows. Needs
            `act_dtype="fp32"`.
        act_dtype: `"uint8"`: an eager model becomes one of torch's integer kernels, an exported program one with
            quantize and dequantize operators. `"fp32"`: activations stay in float; the linear layers of an eager
            model become INC's packed ones.
        preset, solver, scale, asymmetric, correct_bias, column_weighting, damping, rounding, holdout, max_columns,
            refine, seed: as in `adaround_plugin.adaround`; `preset="paper"` is the paper's own method, `"blocks"`
            learns the layers of a block together. They and `act_dtype` hold for the whole pass: local parts follow the
            global one.
        white_list: `"*"` for every weighted layer; a list of names, patterns and module types; None for nothing but
            what `set_local` adds. A pattern is what `exclude` of `adaround` takes: a name, the name of a parent, or a
            regular expression on whole names; also the name of a module type.

    Raises:
        InvalidOptionError: unknown parameter, or a value out of range.
    """

    name: ClassVar[str] = "adaround"
    supported_configs: ClassVar[list[OperatorConfig]] = []

    def __init__(
        self,
        dtype: Tunable[Literal["int", "fp32"]] = "int",
        bits: Tunable[Annotated[int, Field(ge=2, le=8)]] = 4,
        use_sym: Tunable[bool] = True,
        w_granularity: Tunable[Literal["per_channel", "per_tensor"]] = "per_channel",
        group_size: Tunable[Literal[-1] | Annotated[int, Field(ge=1)]] = -1,
        act_dtype: Tunable[Literal["uint8", "fp32"]] = "uint8",
        preset: Tunable[Literal["default", "paper", "blocks"]] = "default",
        solver: Tunable[
            Literal["auto", "annealing", "coordinate_descent", "cross_entropy", "nearest", "relaxation", "gptq"]
        ] = "auto",
        scale: Tunable[Literal["auto", "observer", "search"]] = "auto",
        asymmetric: Tunable[bool | Literal["auto"]] = "auto",
        correct_bias: Tunable[bool | Literal["auto"]] = "auto",
        column_weighting: Tunable[Literal["auto", "none", "inverse_norm", "fisher"]] = "auto",
        damping: Tunable[Annotated[float, Field(gt=0)] | Literal["auto"]] = "auto",
        rounding: Tunable[Literal["auto", "grid", "up_or_down"]] = "auto",
        holdout: Tunable[Annotated[float, Field(ge=0, le=0.5)] | Literal["auto"]] = "auto",
        max_columns: Tunable[Annotated[int, Field(ge=1)]] = 16384,
        refine: Tunable[bool] = False,
        seed: Tunable[int] = 0,
        white_list: list[str | type[nn.Module]] | Literal["*"] | None = DEFAULT_WHITE_LIST,
        **kwargs: Any,
    ) -> None:
        given = locals()
        if unknown := kwargs.keys() - _INTERNAL:
            raise InvalidOptionError("AdaRoundConfig", f"has no {sorted(unknown)}", f"It has {sorted(_ADAPTERS)}.")
        super().__init__(white_list=_checked("white_list", white_list))
        for parameter in (*LAYER_SETTINGS, *PASS_SETTINGS):
            setattr(self, parameter, given[parameter])
        self._post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _checked(name, value) if name in _ADAPTERS else value)

    def get_params_dict(self) -> dict[str, Any]:
        """The parameters by name, `white_list` left out."""
        return {name: getattr(self, name) for name in (*LAYER_SETTINGS, *PASS_SETTINGS)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads; module types are written by their names."""
        if self.global_config is not None and not self.local_config:
            return self.get_params_dict()
        return {
            # null: INC reads a missing global part as one of defaults
            GLOBAL: None if self.global_config is None else self.get_params_dict(),
            LOCAL: {text(key): part.get_params_dict() for key, part in self.local_config.items()},
        }

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """The configuration that `to_dict` wrote: parameters, or a `"global"` and a `"local"` part.

        A missing global part has the defaults, as in INC's own configurations; None is none.
        """
        if GLOBAL not in config_dict and LOCAL not in config_dict:
            return cls(**config_dict)
        if extra := config_dict.keys() - {GLOBAL, LOCAL}:
            raise InvalidOptionError(
                "configuration", f"{sorted(extra)} stand beside its parts", f"Move them into {GLOBAL!r}."
            )
        whole, parts = config_dict.get(GLOBAL, {}), config_dict.get(LOCAL, {})
        # without a global part the first local one says what holds for the whole pass
        config = cls(**next(iter(parts.values()), {}), white_list=None) if whole is None else cls(**whole)
        for key, part in parts.items():
            config.set_local(key, cls(**part))
        return config

    @classmethod
    def from_json_file(cls, filename: str) -> Self:
        """The configuration that `to_json_file` wrote."""
        with open(filename, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    def __add__(self, other: AdaRoundConfig) -> AdaRoundConfig:
        """A new configuration with the local parts of both; those of `other` win.

        Raises:
            InvalidOptionError: what INC would drop without a word: a second global part, another algorithm, or the
                same configuration again (INC's reading of a dict of two algorithms adds the first to itself).
        """
        if not isinstance(other, AdaRoundConfig):
            raise InvalidOptionError(
                f"AdaRoundConfig + {type(other).__name__}",
                "mixes algorithms, and INC drops the global parts of such sums",
                "Call quantize once for each algorithm, with white lists.",
            )
        if self == other:
            raise InvalidOptionError(
                "AdaRoundConfig + AdaRoundConfig",
                "is the same configuration twice; INC makes that of a dict of two algorithms",
                "Name one algorithm in a dict.",
            )
        if None not in (self.global_config, other.global_config) and self.global_config != other.global_config:
            raise InvalidOptionError(
                "AdaRoundConfig + AdaRoundConfig",
                "has two global parts",
                "Give one of them a white_list, or use set_local.",
            )
        total = copy.deepcopy(self if other.global_config is None else other)
        total.local_config = copy.deepcopy({**self.local_config, **other.local_config})
        return total

    def expand(self) -> list[AdaRoundConfig]:
        """One configuration for each combination of the listed values; INC's autotune asks for it."""
        lists = {name: value for name, value in self.get_params_dict().items() if isinstance(value, list)}
        if not lists:
            return [self]
        listed = type(self)(**self.get_params_dict(), white_list=None)
        own = {key: part for key, part in self.local_config.items() if part != listed}
        expanded = []
        for values in product(*lists.values()):
            chosen = {**self.get_params_dict(), **dict(zip(lists, values, strict=True))}
            config = type(self)(**chosen, white_list=self.white_list)
            config.local_config.update(copy.deepcopy(own))
            expanded.append(config)
        return expanded

    def get_model_info(self, model: nn.Module) -> list[Layer]:
        """Name and type of every layer that the configuration can address."""
        return weighted_layers(model, linear_only=self.act_dtype == "fp32")

    def to_config_mapping(
        self, config_list: list[AdaRoundConfig] | None = None, model_info: list[Layer] | None = None
    ) -> OrderedDict[Layer, AdaRoundConfig]:
        """The part that applies to each layer, as `adaround_plugin.inc.parts.resolve` gives it.

        Args:
            config_list: configurations whose parts apply in turn; this one alone by default.
            model_info: what `get_model_info` returned.
        """
        return resolve(config_list or [self], model_info or [])

    @classmethod
    def register_supported_configs(cls) -> None:
        """Tell INC which values and operators there are."""
        every = cls(bits=list(range(2, 9)), use_sym=[True, False], w_granularity=["per_channel", "per_tensor"])
        cls.supported_configs = [OperatorConfig(config=every, operators=list(WEIGHTED))]

    @classmethod
    def get_config_set_for_tuning(cls) -> AdaRoundConfig:
        """What `autotune` tries when told to try everything: 4 bits, then 8."""
        return cls(bits=[4, 8])


def _checked(name: str, value: Any) -> Any:
    """`value`, if the annotation of the parameter admits it."""
    try:
        _ADAPTERS[name].validate_python(value, strict=True)
    except ValidationError as error:
        reasons = [
            detail["msg"] for detail in error.errors() if isinstance(value, list) or detail["type"] != "list_type"
        ]
        raise InvalidOptionError(
            name, f"{value!r} is not accepted", f"{' or '.join(dict.fromkeys(reasons))}."
        ) from None
    return value


_ADAPTERS = {
    name: TypeAdapter(hint)
    for name, hint in get_type_hints(AdaRoundConfig.__init__, include_extras=True).items()
    if name not in ("return", "kwargs")
}
AdaRoundConfig.register_supported_configs()
