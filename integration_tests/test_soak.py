"""A few of the bad days of `soak`: one of every fault, in both hosts, and an interrupt that comes in time."""

from __future__ import annotations

import pytest

from integration_tests.benchmarks.soak import FAULTS, survive

INTERRUPTS = [fault for fault in FAULTS if fault.startswith("interrupt")]
# these draw a host of their own
DISKS = [fault for fault in FAULTS if fault == "full disk"]


@pytest.mark.parametrize("host", ["fx", "pt2e"])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in INTERRUPTS + DISKS])
def test_nothing_is_lost(host: str, fault: str) -> None:
    survive(1, host, fault)


# an interrupt that falls into a callback of the garbage collector, as hypothesis has one, is dropped there by Python
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("host", ["fx", "pt2e"])
@pytest.mark.parametrize("fault", INTERRUPTS)
def test_nothing_is_lost_by_an_interrupt(host: str, fault: str) -> None:
    # one may come when all is done
    assert any(survive(seed, host, fault).startswith("interrupted") for seed in range(1, 10))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("fault", DISKS)
def test_nothing_is_lost_on_a_full_disk(fault: str) -> None:
    assert {survive(seed, "fx", fault) for seed in range(1, 7)} == {"old file kept", "no file left"}
