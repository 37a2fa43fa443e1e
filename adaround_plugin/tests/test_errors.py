"""One family of errors that say what to do, and survive the way between processes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from adaround_plugin import errors
from adaround_plugin.errors import (
    AdaRoundError,
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    MissingDependencyError,
    NonFiniteError,
)

FAMILY = [
    AdaRoundError,
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    MissingDependencyError,
    NonFiniteError,
]


@pytest.mark.parametrize("kind", FAMILY)
def test_the_message_names_subject_problem_and_remedy(kind):
    error = kind("layer 'conv1'", "has no scale", "Calibrate first.")
    assert str(error) == "layer 'conv1': has no scale. Calibrate first."
    assert (error.subject, error.problem, error.remedy) == ("layer 'conv1'", "has no scale", "Calibrate first.")


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("way", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_errors_can_be_copied_and_pickled(kind, way):
    error = kind("batch 3", "is empty", "Pass data.")
    back = way(error)
    assert type(back) is kind
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_every_error_belongs_to_one_family():
    found = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, Exception)]
    assert set(found) == set(FAMILY)
    assert {kind.__name__ for kind in FAMILY} | {"taking_derivatives"} == set(errors.__all__)
    assert all(issubclass(kind, AdaRoundError) for kind in FAMILY)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InvalidBatchError, ValueError),
        (InvalidModelError, ValueError),
        (InvalidOptionError, ValueError),
        (MissingDependencyError, ImportError),
        (NonFiniteError, ArithmeticError),
    ],
)
def test_each_is_also_the_builtin_that_callers_expect(kind, builtin):
    with pytest.raises(builtin):
        raise kind("a", "b", "c")
