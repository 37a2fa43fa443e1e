"""The PT2E flow of torchao (`pip install 'adaround_plugin[pt2e]'`): its observers, quantizers, and prepared models.

Imports what stands beside it in `hosts`, and below. The pass itself is the same `adaround_plugin.adaround`.
"""

from adaround_plugin.hosts.pt2e.any_quantizer import AdaRoundQuantizer
from adaround_plugin.hosts.pt2e.observers import AdaRoundGroupObserver, AdaRoundObserver
from adaround_plugin.hosts.pt2e.quantizers import (
    AdaRoundWeightOnlyQuantizer,
    get_adaround_weight_spec,
    get_adaround_x86_inductor_config,
)

__all__ = [
    "AdaRoundGroupObserver",
    "AdaRoundObserver",
    "AdaRoundQuantizer",
    "AdaRoundWeightOnlyQuantizer",
    "get_adaround_weight_spec",
    "get_adaround_x86_inductor_config",
]
