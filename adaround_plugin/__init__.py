"""AdaRound (Nagel et al. 2020, arXiv 2004.10568) as a plugin for the quantization flows of PyTorch."""

from .errors import AdaRoundError, InvalidBatchError, InvalidModelError, InvalidOptionError, NonFiniteError
from .learn import adaround
from .observers import AdaRoundObserver
from .qconfig import get_adaround_qconfig_mapping, get_weight_only_backend_config
from .report import get_report

__all__ = [
    "AdaRoundError",
    "AdaRoundObserver",
    "InvalidBatchError",
    "InvalidModelError",
    "InvalidOptionError",
    "NonFiniteError",
    "adaround",
    "get_adaround_qconfig_mapping",
    "get_report",
    "get_weight_only_backend_config",
]

__version__ = "0.1.0"
