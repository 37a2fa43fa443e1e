"""Every name of Intel Neural Compressor that the package touches, in one place."""

from __future__ import annotations

from typing import Any

from torch import fx

from adaround_plugin.errors import InvalidOptionError, MissingDependencyError

try:
    from neural_compressor.common.base_config import register_config
    from neural_compressor.common.utils import DEFAULT_WHITE_LIST, GLOBAL, LOCAL, STATIC_QUANT, Mode
    from neural_compressor.torch.algorithms.base_algorithm import Quantizer
    from neural_compressor.torch.algorithms.pt2e_quant.core import W8A8PT2EQuantizer
    from neural_compressor.torch.algorithms.pt2e_quant.pt2e_compat import X86InductorQuantizer
    from neural_compressor.torch.algorithms.pt2e_quant.save_load import save as save_exported
    from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear
    from neural_compressor.torch.algorithms.weight_only.save_load import save as save_weight_only
    from neural_compressor.torch.quantization.config import FRAMEWORK_NAME, OperatorConfig, RTNConfig, TorchBaseConfig
    from neural_compressor.torch.utils import register_algo
    from neural_compressor.torch.utils.constants import LM_HEAD_NAMES
except ImportError as error:
    raise MissingDependencyError.of("neural-compressor", "inc", error) from error

__all__ = [
    "DEFAULT_WHITE_LIST",
    "FRAMEWORK_NAME",
    "GLOBAL",
    "INTERNAL",
    "LM_HEAD_NAMES",
    "LOCAL",
    "STATIC_QUANT",
    "INCWeightOnlyLinear",
    "Mode",
    "OperatorConfig",
    "Quantizer",
    "RTNConfig",
    "SoleConfig",
    "TorchBaseConfig",
    "W8A8PT2EQuantizer",
    "X86InductorQuantizer",
    "mark_exported",
    "register_algo",
    "register_config",
    "save_exported",
    "save_weight_only",
]


# what INC hands back to a configuration's constructor among its parameters
INTERNAL = {"params_list", "non_tunable_params", "_is_initialized"}


def mark_exported(model: fx.GraphModule) -> fx.GraphModule:
    """Tell INC that `model` is an exported program, as its own `export` does; a copy loses the mark."""
    vars(model)["_exported"] = True
    return model


class SoleConfig(TorchBaseConfig):
    """A configuration that cannot be a term of INC's sums of several algorithms."""

    def finish(self) -> None:
        """What INC wants called once the parameters are set."""
        self._post_init()

    def _get_op_name_op_type_config(self) -> Any:
        """INC's sums ask each term for its local parts, and drop the global ones."""
        raise InvalidOptionError(
            f"a sum with {type(self).__name__}",
            "mixes algorithms, and INC drops the global parts of such sums",
            "Call quantize once for each algorithm, with white lists.",
        )
