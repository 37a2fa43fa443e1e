"""What commands print: a report as tables in a terminal where rich is installed, and everything else as text."""

from __future__ import annotations

import sys

from adaround_plugin.report import Report

__all__ = ["show"]


def show(told: object) -> None:
    """Print a line, or a result."""
    if isinstance(told, Report) and sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            Console().print(told)
            return
    print(told, flush=True)
