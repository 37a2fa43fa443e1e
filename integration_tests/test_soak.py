"""A few of the bad days of `soak`: one of every fault, in both hosts."""

from __future__ import annotations

import pytest

from integration_tests.benchmarks.soak import FAULTS, survive


# an interrupt that falls into a callback of the garbage collector, as hypothesis has one, is dropped there by Python
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("host", ["fx", "pt2e"])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(host: str, fault: str) -> None:
    for seed in (1, 2):
        survive(seed, host, fault)
