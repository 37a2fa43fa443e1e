"""What holds of every network holds of those that nobody wrote: exact, repeatable, no worse than nearest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from integration_tests.benchmarks.random_graphs import KINDS, RandomNetwork, check, drawn


@pytest.mark.parametrize("host", ["fx", "pt2e"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_a_random_network(host: str, seed: int) -> None:
    check(drawn(seed, host))


def test_every_kind_of_step_is_drawn() -> None:
    drawn_kinds = {kind for seed in range(60) for kind in RandomNetwork(seed, writes=True).kinds}
    assert drawn_kinds == set(KINDS)
