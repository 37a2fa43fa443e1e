"""What a model is made of, name by name, so that two models can be compared that are not in one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from adaround_plugin.digests import digest

__all__ = ["differing", "fingerprint", "structure"]

# what is no setting, or stands in the state
_NO_SETTING = {"scale", "zero_point", "qconfig"}


def structure(model: fx.GraphModule) -> dict[str, str]:
    """The code of a model, and of each module what is not in the state, by name; nothing of observers."""
    hidden = _observers(model)
    found = {}
    for name, module in model.named_modules():
        if _is_inside(name, hidden):
            continue
        if isinstance(module, fx.GraphModule):
            # toolkits leave marks of their own on it
            found[name] = module.code
            continue
        settings = {key: value for key, value in vars(module).items() if _is_plain(value) and key not in _NO_SETTING}
        found[name] = f"{type(module).__name__} {settings}"
    return found


def fingerprint(model: fx.GraphModule) -> dict[str, str]:
    """A digest of each module's structure and of each entry of the state, by name; nothing of observers."""
    hidden = _observers(model)
    found = {name or "forward": digest(text) for name, text in structure(model).items()}
    for name, value in model.state_dict().items():
        if not _is_inside(name, hidden):
            found[name] = digest(value if isinstance(value, Tensor) else repr(value))
    return found


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names for which two mappings do not say the same, in order."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def _observers(model: nn.Module) -> tuple[str, ...]:
    """Names of the observers."""
    return tuple(name for name, module in model.named_modules(remove_duplicate=False) if _observes(module))


def _observes(module: nn.Module) -> bool:
    return hasattr(module, "calculate_qparams")


def _is_inside(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a name is that of one of the modules, or of something inside one."""
    return name in modules or name.startswith(tuple(f"{module}." for module in modules))


def _is_plain(value: Any) -> bool:
    """Whether a value reads the same wherever it is written out."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, int | float | str)
