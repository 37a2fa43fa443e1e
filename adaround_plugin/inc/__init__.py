"""AdaRound for Intel Neural Compressor: importing this package registers the configuration and the algorithm.

Needs neural-compressor (`pip install 'adaround_plugin[inc]'`).
"""

from adaround_plugin.inc.algorithm import adaround_entry
from adaround_plugin.inc.compat import register_algo
from adaround_plugin.inc.config import AdaRoundConfig
from adaround_plugin.inc.saving import load, save

__all__ = ["AdaRoundConfig", "load", "save"]

register_algo(AdaRoundConfig.name)(adaround_entry)
