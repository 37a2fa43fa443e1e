"""The progress bar."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from tqdm import tqdm

from adaround_plugin.report import LayerReport

__all__ = ["Progress"]


class Progress:
    """Shows what is done, the layer that was decided last, its error and the time left; a context manager.

    Work goes through stages. Each fills the bar from its beginning, with an estimate of its own of the time left.

    Args:
        shown: whether to show anything.
    """

    def __init__(self, shown: bool) -> None:
        self._bar = tqdm(desc="AdaRound", unit="layer", disable=not shown)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def stage(self, name: str, total: int, unit: str = "layer") -> None:
        """Begin a stage.

        Args:
            name: as a participle: what is being done.
            total: how many units it has.
            unit: what is counted.
        """
        # how the stage before ended: the bar shows itself now and then only
        self._bar.refresh()
        self._bar.unit = unit
        self._bar.set_description_str(f"AdaRound, {name}", refresh=False)
        self._bar.set_postfix_str("", refresh=False)
        self._bar.reset(total)

    def say(self, text: str) -> None:
        """Show what is being done."""
        self._bar.set_postfix_str(text)

    def move(self, done: int) -> None:
        """So many units of the stage are done."""
        self._bar.update(done - self._bar.n)

    def layer(self, report: LayerReport) -> None:
        """Count a layer."""
        self.passed(f"{report.name} {report.nearest_error:.2e} -> {report.learned_error:.2e}")

    def passed(self, text: str) -> None:
        """Count a unit, and show what is known of it."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def step(self, name: str, iteration: int, loss: float) -> None:
        """Show how learning on samples goes, and count it in a stage of steps.

        Args:
            name: of what is learned.
            iteration: how many steps are made.
            loss: relative to that of the start.
        """
        self._bar.set_postfix_str(f"{name} step {iteration}, {loss:.2f} of the error at the start", refresh=False)
        if self._bar.unit == "step":
            self.move(iteration)
        self._bar.refresh()
