"""The clamps that an FX host of ours puts before a quantize node whose dtype has more integers than the observer."""

from __future__ import annotations

from torch import fx

__all__ = ["is_clamp", "mark_clamp"]

# meta entry of a clamp of ours, which the host's conversion keeps
_CLAMP = "adaround_clamp"


def mark_clamp(node: fx.Node) -> None:
    """Mark a node as a clamp of ours: it keeps the activation behind it inside the range of its observer."""
    node.meta[_CLAMP] = True


def is_clamp(node: fx.Node) -> bool:
    """Whether a node is one of these, also in the host's conversion of the model."""
    return bool(node.meta.get(_CLAMP))
