from __future__ import annotations

import sequences

from pdserve.cache.retired import RetiredSequences
from pdserve.cache.sequence import Sequence


def test_without_anything_outstanding_it_is_released_at_once() -> None:
    released: list[Sequence] = []
    retired = RetiredSequences(released.append)
    seq = sequences.sequence(4)
    retired.add(seq)
    assert released == [seq] and not retired


def test_it_waits_for_the_last_row_in_flight() -> None:
    released: list[Sequence] = []
    retired = RetiredSequences(released.append)
    seq = sequences.sequence(4)
    seq.num_inflight, seq.block_table = 2, [1, 2, 3]
    retired.add(seq)
    assert seq in retired and retired.num_returning_blocks == 3
    for left in (1, 0):
        assert released == []
        seq.num_inflight = left
        retired.row_read(seq)
    assert released == [seq] and seq not in retired and retired.num_returning_blocks == 0


def test_it_waits_for_its_transfer() -> None:
    released: list[Sequence] = []
    retired = RetiredSequences(released.append)
    seq = sequences.sequence(4)
    seq.block_table = [1]
    retired.lend(seq)
    assert list(retired) == [seq]
    assert retired.num_returning_blocks == 0  # no step will bring them back
    assert retired.returned(seq.attempt)
    assert released == [seq]
    assert not retired.returned(seq.attempt)


def test_it_waits_for_both_in_either_order() -> None:
    for transfer_first in (True, False):
        released: list[Sequence] = []
        retired = RetiredSequences(released.append)
        seq = sequences.sequence(4)
        seq.num_inflight = 1
        retired.lend(seq)
        if transfer_first:
            retired.returned(seq.attempt)
        seq.num_inflight = 0
        if transfer_first:
            assert released == []
        retired.row_read(seq)
        if not transfer_first:
            assert released == [] and seq in retired
            retired.returned(seq.attempt)
        assert released == [seq]


def test_a_dropped_sequence_and_its_successor_are_kept_apart() -> None:
    """The transfer belongs to the one that was lent, not to all of that attempt."""
    released: list[Sequence] = []
    retired = RetiredSequences(released.append)
    old = sequences.sequence(4)
    old.num_inflight = 1
    retired.add(old)
    new = old.fresh()
    retired.lend(new)
    old.num_inflight = 0
    retired.row_read(old)
    assert released == [old]
    retired.returned(new.attempt)
    assert released == [old, new]
