"""What a learned model needs to get onto a device: the same integers, declared or stored otherwise.

One file for each way of storing them. Imports `hosts`, `graph`, `rounding`, `names` and `report`. Files that need a
library of their own (`executorch_programs`, `onnx_weights`, `onnx_translations`, `torchao_tensors`) are imported by
name, and say which extra brings it.
"""

from adaround_plugin.deployment.ranges import widen_weight_ranges

__all__ = ["widen_weight_ranges"]
