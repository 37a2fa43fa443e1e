"""AdaRound in torchao's PT2E flow: weight observers, and quantizers and their settings that use them.

Needs torchao (`pip install 'adaround_plugin[pt2e]'`). The pass itself is the same `adaround_plugin.adaround`.
"""

from adaround_plugin.hosts.pt2e.observers import AdaRoundGroupObserver, AdaRoundObserver
from adaround_plugin.hosts.pt2e.quantizers import (
    AdaRoundWeightOnlyQuantizer,
    get_adaround_weight_spec,
    get_adaround_x86_inductor_config,
)

__all__ = [
    "AdaRoundGroupObserver",
    "AdaRoundObserver",
    "AdaRoundWeightOnlyQuantizer",
    "get_adaround_weight_spec",
    "get_adaround_x86_inductor_config",
]
