"""ReLU6 with a cap of its own for each channel: what ReLU6 becomes when its channels are scaled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CappedReLU"]


class CappedReLU(nn.Module):
    """`min(max(x, 0), cap)`, the cap broadcast over the positions.

    With a scale `s > 0`, `min(max(x, 0), 6) = s min(max(x / s, 0), 6 / s)`: exact, as long as each channel has its cap.

    The ReLU stands alone, so that hosts fuse it with the layer before it.

    Args:
        cap: `(channels, 1, ...)`, with an axis of length 1 for each axis of the input after its channels.
    """

    cap: Tensor

    def __init__(self, cap: Tensor) -> None:
        super().__init__()
        self.register_buffer("cap", cap)

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(F.relu(x), self.cap)

    def extra_repr(self) -> str:
        return f"channels={self.cap.shape[0]}"
