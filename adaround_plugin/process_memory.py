"""The most memory that was in use, as the system tells it."""

from __future__ import annotations

import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["peak_memory"]


def peak_memory() -> dict[str, int]:
    """Bytes: of the `process` since it began, where the system tells, and of each GPU that torch uses."""
    found = {}
    if resource is not None:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS counts bytes, others kilobytes
        found["process"] = largest if sys.platform == "darwin" else 1024 * largest
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            if used := torch.cuda.max_memory_allocated(device):
                found[f"cuda:{device}"] = used
    return found
