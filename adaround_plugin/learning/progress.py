"""A progress bar over the layers of a pass."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from tqdm import tqdm

from adaround_plugin.report import LayerReport

__all__ = ["Progress"]


class Progress:
    """Shows the layer that was decided last, its error and the time left; a context manager.

    Args:
        layers: how many there are.
        shown: whether to show anything.
    """

    def __init__(self, layers: int, shown: bool) -> None:
        self._bar = tqdm(total=layers, desc="AdaRound", unit="layer", disable=not shown)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """Show what is being done."""
        self._bar.set_postfix_str(text)

    def layer(self, report: LayerReport) -> None:
        """Count a layer."""
        errors = f"{report.nearest_error:.2e} -> {report.learned_error:.2e}"
        self._bar.set_postfix_str(f"{report.name} {errors}", refresh=False)
        self._bar.update()

    def step(self, name: str, iteration: int, loss: float) -> None:
        """Show how learning on samples goes: the loss is relative to that of the start."""
        self._bar.set_postfix_str(f"{name} step {iteration}, {loss:.2f} of the error at the start")
