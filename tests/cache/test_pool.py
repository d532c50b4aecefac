from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.cache.pool import BlockPool
from pdserve.core.generations import Generations
from pdserve.core.messages import BlockCounts


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4)
    first = pool.allocate(3)
    assert first is not None and len(set(first)) == 3
    assert pool.allocate(2) is None
    assert pool.counts() == BlockCounts(total=4, free=1, cached=0, held=3)
    assert pool.allocate(0) == []
    assert pool.allocate(1) is not None
    assert pool.num_available == 0
    pool.check()


def test_a_block_is_free_when_its_last_reference_goes() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.retain(blocks)
    pool.release(blocks)
    assert pool.counts().held == 2
    pool.release(blocks)
    assert pool.counts() == BlockCounts(total=2, free=2, cached=0, held=0)
    pool.check([])


def test_a_block_that_goes_to_a_new_owner_has_a_new_generation() -> None:
    generations = Generations.private(2)
    pool = BlockPool(2, generations)
    [block] = pool.allocate(1) or []
    assert generations.of([block, 1 - block]) == (1, 0)
    assert pool.label(block, b"a")
    pool.release([block])
    pool.retain([block])  # taken up again with what it holds: whoever reads it may go on
    assert generations.of([block]) == (1,)
    pool.release([block])
    assert pool.allocate(2) is not None
    assert generations.of([block, 1 - block]) == (2, 1)


def test_a_named_block_stays_findable_until_its_room_is_needed() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1) or []
    assert pool.label(block, b"a")
    assert pool.find(b"a") == block
    pool.release([block])
    assert pool.counts() == BlockCounts(total=2, free=1, cached=1, held=0)
    pool.retain([block])
    assert pool.counts().cached == 0
    pool.release([block])
    assert pool.allocate(2) is not None
    assert pool.find(b"a") is None
    pool.check()


def test_what_was_released_longest_ago_is_evicted_first_and_of_a_text_its_end() -> None:
    pool = BlockPool(4)
    old = pool.allocate(2) or []
    new = pool.allocate(2) or []
    for block, name in zip([*old, *new], (b"old 0", b"old 1", b"new 0", b"new 1"), strict=True):
        pool.label(block, name)
    pool.release(old)
    pool.release(new)
    evicted = []
    for _ in range(4):
        pool.allocate(1)
        names = (b"old 0", b"old 1", b"new 0", b"new 1")
        gone = [name for name in names if pool.find(name) is None and name not in evicted]
        evicted += gone
    assert evicted == [b"old 1", b"old 0", b"new 1", b"new 0"]
    pool.check()


def test_one_content_has_one_block() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2) or []
    assert pool.label(first, b"a")
    assert pool.label(first, b"a")  # said again
    assert not pool.label(second, b"a")
    pool.release([first, second])
    assert pool.find(b"a") == first
    assert pool.counts() == BlockCounts(total=2, free=1, cached=1, held=0)
    pool.check()


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1) or []
    pool.release([block])
    with pytest.raises(AssertionError, match="more often"):
        pool.release([block])
    with pytest.raises(KeyError):
        pool.retain([block])
    with pytest.raises(AssertionError, match="not held"):
        pool.label(block, b"a")


def test_check_sees_a_leak_and_a_reference_too_few() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2) or []
    pool.check([blocks])
    with pytest.raises(AssertionError, match="references"):
        pool.check([blocks[:1]])
    with pytest.raises(AssertionError, match="references"):
        pool.check([blocks, blocks])


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls, against a model that counts references block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.tables: list[list[int]] = []

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        available = self.pool.num_available
        blocks = self.pool.allocate(count)
        assert (blocks is not None) == (count <= available)
        if blocks is not None:
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.retain(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def label(self, data: st.DataObject, name: bytes) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        block = data.draw(st.sampled_from(table))
        if not any(self.pool.find(other) == block for other in (b"a", b"b", b"c", b"d")):
            owner = self.pool.find(name)
            assert self.pool.label(block, name) == (owner is None)

    @rule(name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def take_up(self, name: bytes) -> None:
        block = self.pool.find(name)
        if block is not None:
            self.pool.retain([block])
            self.tables.append([block])

    @invariant()
    def adds_up(self) -> None:
        self.pool.check(self.tables)
        counts = self.pool.counts()
        assert counts.free + counts.cached + counts.held == counts.total == 6
        assert counts.held == len({block for table in self.tables for block in table})


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
