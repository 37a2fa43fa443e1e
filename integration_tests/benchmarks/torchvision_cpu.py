"""torchvision, also where its compiled operators do not fit the installed torch.

The torchvision that PyPI has for Linux is built for torch with CUDA. Beside a CPU build of torch its operators cannot
be loaded, and `import torchvision` stops where it describes two of them, `nms` and `qnms`, which no classifier needs.
Their schemas are enough to go on. Import torchvision's parts from here, nowhere else.
"""

from torch.library import Library

__all__ = ["datasets", "models", "transforms"]

try:
    from torchvision import datasets, models, transforms
except RuntimeError as error:
    if "operator torchvision::nms does not exist" not in str(error):
        raise
    # what a Library defines lives as long as the Library
    _operators = Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for _name in ("nms", "qnms"):
        _operators.define(  # type: ignore[no-untyped-call]
            f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    from torchvision import datasets, models, transforms
