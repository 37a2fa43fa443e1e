"""One family of errors that say what to do, and survive the way between processes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from adaround_plugin import errors
from adaround_plugin.errors import (
    AdaRoundError,
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    MissingDependencyError,
    NonFiniteError,
    ProcessError,
    is_out_of_memory,
    taking_derivatives,
    told_as,
)

FAMILY = [
    AdaRoundError,
    InvalidBatchError,
    InvalidModelError,
    InvalidOptionError,
    MissingDependencyError,
    NonFiniteError,
    ProcessError,
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
    functions = {"is_out_of_memory", "taking_derivatives", "told_as"}
    assert {kind.__name__ for kind in FAMILY} | functions == set(errors.__all__)
    assert all(issubclass(kind, AdaRoundError) for kind in FAMILY)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InvalidBatchError, ValueError),
        (InvalidModelError, ValueError),
        (InvalidOptionError, ValueError),
        (MissingDependencyError, ImportError),
        (NonFiniteError, ArithmeticError),
        (ProcessError, RuntimeError),
    ],
)
def test_each_is_also_the_builtin_that_callers_expect(kind, builtin):
    with pytest.raises(builtin):
        raise kind("a", "b", "c")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["python", "cuda", "cpu", "cublas"],
)
def test_running_out_of_memory_stays_what_it_is(error):
    assert is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, taking_derivatives("option", "Remedy."):
        raise error
    assert caught.value is error


def test_an_error_that_is_told_is_the_cause_and_those_of_other_kinds_pass():
    def tell(error):
        return InvalidModelError("model", f"is broken ({error})", "Repair it.")

    with pytest.raises(InvalidModelError, match=r"is broken \(by that\)") as caught, told_as(tell, ValueError):
        raise ValueError("by that")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(KeyError), told_as(tell, ValueError):
        raise KeyError


def test_what_torch_raises_where_there_is_no_memory_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
