"""`AdaRoundConfig`: what Neural Compressor's users write, and which part of it applies to which layer."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from itertools import product
from typing import Any, ClassVar, Self

from torch import nn

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.inc.compat import (
    FRAMEWORK_NAME,
    GLOBAL,
    INTERNAL,
    LOCAL,
    OperatorConfig,
    SoleConfig,
    register_config,
)
from adaround_plugin.inc.layers import WEIGHTED, Layer, text, weighted_layers
from adaround_plugin.inc.parameters import PARAMETERS, check, method_of, signature
from adaround_plugin.inc.parts import resolve

__all__ = ["AdaRoundConfig"]

# autotune tries configurations of high priority first; INC's GPTQ has 90
_PRIORITY = 95


@register_config(framework_name=FRAMEWORK_NAME, algo_name="adaround", priority=_PRIORITY)
class AdaRoundConfig(SoleConfig):
    """Learned rounding, as a configuration of Intel Neural Compressor.

    Every parameter but `checkpoint`, `model_path` and `white_list` also takes a list of values, which `autotune` tries
    one by one. Local parts take single values.

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
        method: as in `adaround_plugin.adaround`, by name: `"default"`, `"blocks"`, `"best"`, `"paper"` or `"nearest"`.
        solver, search_scale, propagate_error, correct_bias, column_weighting, damping, output_hessian, levels,
            holdout, max_columns: as in `adaround_plugin.LayerWise`; None is what the method has.
        finetune: finetune the whole network in the end; None is what the method's name stands for.
        blocks: name of the `nn.ModuleList` of a language model, such as `"model.layers"`, to learn it block by block;
            None learns it as a whole. Needs an eager model and `act_dtype="fp32"`; layers outside of the blocks stay
            in float.
        model_path: file or folder of the weights that the model has on the device `meta`, as `weights` of
            `adaround_blocks`; they are read as float32. Needs `blocks`.
        quant_lm_head: False leaves layers that INC takes for the head of a language model (`lm_head`, `output_layer`,
            `embed_out`) in float, as its own weight-only configurations do unless told otherwise.
        token_mask, seed: as in `adaround_plugin.adaround`.
        checkpoint: as in `adaround_plugin.adaround`, a text: the folder that keeps decisions, so that an interrupted
            call goes on. Of listed values each combination has a folder of its own in it, `0`, `1` and so on. What
            follows `group_size` up to here holds for the whole pass: local parts follow the global one.
        white_list: `"*"` for every weighted layer; a list of names, patterns and module types; None for nothing but
            what `set_local` adds. A pattern is what `exclude` of `adaround` takes: a name, the name of a parent, or a
            regular expression on whole names; also the name of a module type.

    Raises:
        InvalidOptionError: unknown parameter, or a value out of range.
    """

    name: ClassVar[str] = "adaround"
    supported_configs: ClassVar[list[OperatorConfig]] = []

    def __init__(self, **given: Any) -> None:
        known = {one.name: one.default for one in PARAMETERS}
        if unknown := given.keys() - {*known, "white_list", *INTERNAL}:
            raise InvalidOptionError("AdaRoundConfig", f"has no {sorted(unknown)}", f"It has {sorted(known)}.")
        super().__init__(**{name: check(name, given[name]) for name in ("white_list",) if name in given})
        for name, default in known.items():
            setattr(self, name, given.get(name, default))
        self.finish()

    __init__.__signature__ = signature()  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, check(name, value))

    def get_params_dict(self) -> dict[str, Any]:
        """The parameters by name, `white_list` left out."""
        return {one.name: getattr(self, one.name) for one in PARAMETERS}

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
        own = {key: part for key, part in self.local_config.items() if part.get_params_dict() != self.get_params_dict()}
        expanded = []
        for number, values in enumerate(product(*lists.values())):
            chosen = {**self.get_params_dict(), **dict(zip(lists, values, strict=True))}
            if self.checkpoint is not None:
                chosen["checkpoint"] = f"{self.checkpoint}/{number}"
            config = type(self)(**chosen, white_list=self.white_list)
            # those that a white list made, after a file was read too
            listed = {key: type(self)(**chosen, white_list=None) for key in self.local_config.keys() - own.keys()}
            config.local_config = {key: copy.deepcopy({**own, **listed}[key]) for key in self.local_config}
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

        Raises:
            InvalidOptionError: as `resolve` does, or the method has no place for an option that is given.
        """
        parts = resolve(config_list or [self], model_info or [])
        method_of(next(iter(parts.values())))  # complains now, if it must, and not after the calibration
        return parts

    @classmethod
    def register_supported_configs(cls) -> None:
        """Tell INC which values and operators there are."""
        every = cls(bits=list(range(2, 9)), use_sym=[True, False], w_granularity=["per_channel", "per_tensor"])
        cls.supported_configs = [OperatorConfig(config=every, operators=list(WEIGHTED))]

    @classmethod
    def get_config_set_for_tuning(cls) -> AdaRoundConfig:
        """What `autotune` tries when told to try everything: 4 bits, then 8."""
        return cls(bits=[4, 8])


AdaRoundConfig.register_supported_configs()
