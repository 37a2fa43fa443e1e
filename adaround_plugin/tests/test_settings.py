"""Settings as text, and what tells one object from another, in this process and in the next."""

from __future__ import annotations

import functools
import operator
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.learning.settings import state_of, written_out


class Plain:
    """Holds anything."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    """The same without a dict."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Other(Plain):
    """Another type of the same state."""


class Silent:
    """Has no text."""

    def __repr__(self) -> str:
        raise RuntimeError("none")


@dataclass
class Holder:
    """A setting among others."""

    solver: object
    steps: int = 3
    hidden: int = field(default=0, repr=False)


def scaled(factor: float) -> Callable[[float], float]:
    return lambda value, more=factor: value * factor + more


def drawn(seed: int) -> random.Random:
    return random.Random(seed)


def circle(value: int) -> Plain:
    one = Plain([value])
    one.value.append(one)
    return one


# by name, how to make one of a number; two of one number are alike, those of two are not
MAKERS: dict[str, Callable[[int], Any]] = {
    "attributes": Plain,
    "slots": Slotted,
    "hidden field": lambda number: Holder("gptq", hidden=number),
    "nested": lambda number: Plain({"a": [Slotted((number, None))]}),
    "set": lambda number: Plain({"a", "b", str(number)}),
    "tensor": lambda number: Plain(torch.full((2,), float(number))),
    "array": lambda number: Plain(np.full((2, 3), number)),
    "generator": lambda number: Plain(torch.Generator().manual_seed(number)),
    "numpy's generator": lambda number: Plain(np.random.default_rng(number)),
    "Python's generator": drawn,
    "function": scaled,
    "partial": lambda number: functools.partial(operator.add, number),
    "bound method": lambda number: Plain(Plain(number).__eq__),
    "module": lambda number: Plain(torch.nn.Dropout(number / 10)),
    "circle": circle,
    "type": lambda number: Plain((Plain, Slotted, Other)[number]),
    "dtype": lambda number: Plain((torch.int8, torch.int16, torch.int32)[number]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_objects_of_one_state_are_alike_and_others_are_not(name: str) -> None:
    make = MAKERS[name]
    assert state_of("solver", make(1)) == state_of("solver", make(1))
    assert state_of("solver", make(1)) != state_of("solver", make(2))


def test_types_tell_objects_apart() -> None:
    assert len({state_of("solver", kind(1)) for kind in (Plain, Slotted, Other)}) == 3


def test_another_process_sees_the_same() -> None:
    code = (
        "from adaround_plugin.tests.test_settings import MAKERS, state_of\n"
        "print(*(state_of('solver', make(1)) for make in MAKERS.values()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == [state_of("solver", make(1)) for make in MAKERS.values()]


def test_what_belongs_to_this_process_alone_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"solver: this Plain cannot be told .*Let it hold"):
        state_of("solver", Plain(sys.stderr))


def test_what_has_no_text_is_the_name_of_its_type() -> None:
    found = written_out({"a": Silent(), "b": Holder(Silent()), "c": Holder("gptq"), "d": Plain(1)})
    assert found == {
        "a": "Silent",
        "b": "Holder(solver=Silent, steps=3)",
        "c": "Holder(solver='gptq', steps=3)",
        "d": "Plain",
    }
