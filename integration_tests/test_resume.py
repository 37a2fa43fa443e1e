"""A few of the processes that `resume` kills."""

from __future__ import annotations

from integration_tests.benchmarks.resume import kill_and_resume


def test_killed_processes_go_on_to_the_same_bits() -> None:
    seen = kill_and_resume(4)
    assert seen["kills"] == 4
    assert seen["runs"] >= 1
