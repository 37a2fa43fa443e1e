"""AdaRound (Nagel et al. 2020, arXiv 2004.10568) as a plugin for the quantization flows of PyTorch."""

from adaround_plugin._version import __version__
from adaround_plugin.api import adaround
from adaround_plugin.equalization.equalize import equalize
from adaround_plugin.equalization.report import get_equalization_report
from adaround_plugin.errors import (
    AdaRoundError,
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    MissingDependencyError,
    NonFiniteError,
    ProcessError,
)
from adaround_plugin.guidance.allocation import BitAllocation, suggest_bits
from adaround_plugin.guidance.analysis import Analysis
from adaround_plugin.guidance.analyze import analyze
from adaround_plugin.hosts.fx.observers import AdaRoundObserver
from adaround_plugin.hosts.fx.qconfig import get_adaround_qconfig_mapping, get_weight_only_backend_config
from adaround_plugin.learning.blockwise import BlockWise
from adaround_plugin.learning.finetuning import Finetune
from adaround_plugin.learning.layerwise import LayerWise
from adaround_plugin.learning.methods import METHODS
from adaround_plugin.learning.paper import Paper
from adaround_plugin.report import get_report
from adaround_plugin.saving.rounding import load_rounding, save_rounding

__all__ = [
    "METHODS",
    "AdaRoundError",
    "AdaRoundObserver",
    "Analysis",
    "BitAllocation",
    "BlockWise",
    "Finetune",
    "InvalidBatchError",
    "InvalidModelError",
    "InvalidOptionError",
    "LayerWise",
    "MissingDependencyError",
    "NonFiniteError",
    "Paper",
    "ProcessError",
    "__version__",
    "adaround",
    "analyze",
    "equalize",
    "get_adaround_qconfig_mapping",
    "get_equalization_report",
    "get_report",
    "get_weight_only_backend_config",
    "load_rounding",
    "save_rounding",
    "suggest_bits",
]
