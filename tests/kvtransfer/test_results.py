"""The descriptor that tells of results."""

from __future__ import annotations

import os

import pytest

from pdserve.kvtransfer.media.results import Results


def test_results_come_in_order_and_failures_are_raised() -> None:
    results: Results[int] = Results()
    assert results.take() == []
    results.put(1)
    results.put(2)
    assert results.take() == [1, 2]
    results.put(ValueError("a copy failed"))
    with pytest.raises(ValueError, match="a copy failed"):
        results.take()
    results.close()


def test_closing_twice_closes_nobody_elses_descriptor() -> None:
    results: Results[int] = Results()
    number = results.fileno()
    results.close()
    other = os.eventfd(0)
    assert other == number, "the lowest free number is given out again"
    results.close()
    os.eventfd_write(other, 1)  # EBADF where it was closed
    os.close(other)
