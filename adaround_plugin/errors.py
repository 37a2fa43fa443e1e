"""One family of errors. Each names the node or argument it is about and says what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = [
    "AdaRoundError",
    "InvalidBatchError",
    "InvalidModelError",
    "InvalidOptionError",
    "MissingDependencyError",
    "NonFiniteError",
    "ProcessError",
    "is_out_of_memory",
    "taking_derivatives",
    "told_as",
]


class AdaRoundError(Exception):
    """Base of every error this package raises on purpose.

    `subject` is the node, layer or argument the error is about, `remedy` what the caller can do.
    """

    def __init__(self, subject: str, problem: str, remedy: str) -> None:
        super().__init__(f"{subject}: {problem}. {remedy}")
        self.subject = subject
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["AdaRoundError"], tuple[str, str, str]]:
        return type(self), (self.subject, self.problem, self.remedy)


class InvalidOptionError(AdaRoundError, ValueError):
    """An argument has a value outside what it accepts."""


class InvalidModelError(AdaRoundError, ValueError):
    """The model is not one the pass can work on: not prepared, not calibrated, in train mode, half precision."""


class InvalidBatchError(AdaRoundError, ValueError):
    """The calibration batches are empty, not finite, lie on another device than the model, or do not fit it."""


class NonFiniteError(AdaRoundError, ArithmeticError):
    """A weight, an activation or an observed range holds NaN or infinity."""


class ProcessError(AdaRoundError, RuntimeError):
    """Another process of the group failed, is gone, or does something else."""


class MissingDependencyError(AdaRoundError, ImportError):
    """An optional dependency of this package is not installed."""

    @classmethod
    def of(cls, package: str, extras: str, error: ImportError) -> "MissingDependencyError":
        """A package that could not be imported, and the extras of this one that install it."""
        return cls(package, f"cannot be imported ({error})", f"Run: pip install 'adaround_plugin[{extras}]'.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, Python's or that of a device: whoever takes an error for another must let this pass."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "allocate memory" in text
        or "ALLOC_FAILED" in text
    )


@contextmanager
def told_as(
    tell: Callable[[Exception], AdaRoundError], kinds: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Tell an error of other code as one of this package; running out of memory stays what it is.

    Args:
        tell: makes an error of what was raised, which becomes its cause.
        kinds: of the errors that are told; others pass.
    """
    try:
        yield
    except kinds as error:
        if is_out_of_memory(error):
            raise
        raise tell(error) from error


@contextmanager
def taking_derivatives(option: str, remedy: str) -> Iterator[None]:
    """Raise `InvalidOptionError` about the option that asks for derivatives where torch cannot take one."""
    with told_as(
        lambda error: InvalidOptionError(option, f"no derivative could be taken ({error})", remedy), RuntimeError
    ):
        yield
