"""Presets: what the options of `adaround` mean where they are left to `"auto"`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.solvers import Annealing, Relaxation

__all__ = ["PRESETS", "resolve"]

# an option that a preset leaves to "auto" is decided by trials, or by the observer
_DEFAULT: dict[str, Any] = {
    "solver": Annealing(),
    "blocks": False,
    "scale": "auto",
    "rounding": "grid",
    "asymmetric": "auto",
    "correct_bias": "auto",
    "column_weighting": "auto",
    "damping": "auto",
    "holdout": 0.125,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # the fast one: second moments, annealed
    "default": _DEFAULT,
    # Nagel et al. 2020, equations 21 to 25 and section 5: floor or ceil, the observer's scale, asymmetric, the
    # activation function in the loss, 10,000 steps of 32 samples, biases as they are, all samples to learn from
    "paper": {
        "solver": Relaxation(),
        "blocks": False,
        "scale": "observer",
        "rounding": "up_or_down",
        "asymmetric": True,
        "correct_bias": False,
        "column_weighting": "none",
        "damping": 0.01,
        "holdout": 0.0,
    },
    # annealed layer by layer, then all roundings of a block together, errors weighed by what they do to the network's
    # output: for 2 bits
    "blocks": {
        **_DEFAULT,
        "solver": Relaxation(
            iterations=1000,
            learning_rate=0.1,
            regularization=30.0,
            beta=(8.0, 2.0),
            start=Annealing(),
            drop=0.5,
            fisher=True,
            learn_scale=True,
        ),
        "column_weighting": "fisher",
        "blocks": True,
    },
}


def resolve(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options given, those that are `"auto"` as the preset has them.

    Raises:
        InvalidOptionError: an unknown preset.
    """
    if preset not in PRESETS:
        raise InvalidOptionError("preset", f"{preset!r} is not known", f"Pass one of {list(PRESETS)}.")
    chosen = PRESETS[preset]
    return {
        name: chosen[name] if isinstance(value, str) and value == "auto" else value for name, value in given.items()
    }
