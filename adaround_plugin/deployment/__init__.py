"""What a converted model needs to get onto a device.

Imports `graph`. The integers that were learned stay what they are; only how they are declared or stored changes.
"""

from adaround_plugin.deployment.ranges import widen_weight_ranges

__all__ = ["widen_weight_ranges"]
