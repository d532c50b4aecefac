from __future__ import annotations

import pytest
import sequences

from pdserve.cache.kvcache import KvCache
from pdserve.cache.sequence import Sequence
from pdserve.core.messages import BlockCounts


def cache(num_blocks: int = 8, prefix_cache: bool = True) -> KvCache:
    return KvCache(num_blocks, 4, b"salt", prefix_cache)


def computed(kv: KvCache, prompt: list[int]) -> Sequence:
    """A sequence whose whole text is in its blocks and stored."""
    seq = sequences.sequence(prompt)
    assert kv.claim(seq)
    sequences.compute(seq)
    kv.store(seq)
    return seq


def test_a_claim_gives_blocks_for_the_whole_text_or_nothing() -> None:
    kv = cache(4)
    first = sequences.sequence(9)
    assert kv.claim(first)
    assert len(first.block_table) == 3 and first.num_cached_tokens == 0
    second = sequences.sequence(5)
    assert not kv.claim(second)
    assert second.block_table == [] and kv.counts().held == 3
    kv.check([first])
    kv.release(first)
    assert kv.claim(second)
    kv.check([second])


def test_a_claim_leaves_the_spare_blocks_alone() -> None:
    kv = cache(4)
    seq = sequences.sequence(12)
    assert not kv.claim(seq, spare=2)
    assert kv.claim(seq, spare=1)
    kv.check([seq])


def test_a_text_takes_up_the_blocks_of_one_that_began_alike() -> None:
    kv = cache()
    first = computed(kv, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = sequences.sequence([1, 2, 3, 4, 5, 6, 7, 8, 10, 11])
    assert kv.claim(second)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.num_cached_tokens == second.num_computed_tokens == 8
    assert second.num_missing_tokens == 2
    kv.check([first, second])
    kv.release(first)
    kv.release(second)
    assert kv.counts() == BlockCounts(total=8, free=6, cached=2, held=0)
    kv.check([])


def test_the_last_token_is_computed_here_even_where_all_is_cached() -> None:
    kv = cache()
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    kv.release(computed(kv, text))
    here = sequences.sequence(text)
    assert kv.claim(here)
    assert here.num_cached_tokens == 4
    from_peer = sequences.sequence(text)
    assert kv.claim(from_peer, computed_here=False)
    assert from_peer.num_cached_tokens == 8
    kv.check([here, from_peer])


def test_cached_blocks_that_a_claim_takes_up_are_not_counted_twice() -> None:
    """Reviving a cached block uses up room as surely as a new one does."""
    kv = cache(3)
    kv.release(computed(kv, [1, 2, 3, 4, 5, 6, 7, 8]))
    assert kv.counts() == BlockCounts(total=3, free=1, cached=2, held=0)
    too_long = sequences.sequence([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    assert not kv.claim(too_long)
    assert kv.counts() == BlockCounts(total=3, free=1, cached=2, held=0)
    just_so = sequences.sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert not kv.claim(just_so, spare=1)
    assert kv.claim(just_so)
    kv.check([just_so])


def test_only_full_computed_blocks_are_stored() -> None:
    kv = cache()
    seq = sequences.sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert kv.claim(seq)
    seq.num_computed_tokens = 7
    kv.store(seq)
    assert seq.num_stored_blocks == 1
    other = sequences.sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert kv.claim(other)
    assert other.num_cached_tokens == 4
    kv.check([seq, other])


def test_the_same_text_computed_twice_is_kept_once() -> None:
    kv = cache()
    text = [1, 2, 3, 4, 5]
    first, second = sequences.sequence(text), sequences.sequence(text)
    assert kv.claim(first) and kv.claim(second)
    for seq in (first, second):
        sequences.compute(seq)
        kv.store(seq)
    kv.check([first, second])
    kv.release(first)
    kv.release(second)
    assert kv.counts() == BlockCounts(total=8, free=7, cached=1, held=0)
    kv.check([])


def test_a_deployment_without_a_prefix_cache_keeps_nothing() -> None:
    kv = cache(prefix_cache=False)
    text = [1, 2, 3, 4, 5]
    kv.release(computed(kv, text))
    assert kv.counts() == BlockCounts(total=8, free=8, cached=0, held=0)
    again = sequences.sequence(text)
    assert kv.claim(again)
    assert again.num_cached_tokens == 0
    kv.check([again])


def test_growth_is_one_block_and_stops_at_the_end_of_the_pool() -> None:
    kv = cache(2)
    seq = sequences.sequence(4)
    assert kv.claim(seq)
    assert kv.grow(seq) and len(seq.block_table) == 2
    assert not kv.grow(seq) and len(seq.block_table) == 2
    kv.check([seq])


def test_blocks_are_not_released_under_a_step_in_flight() -> None:
    kv = cache()
    seq = sequences.sequence(4)
    assert kv.claim(seq)
    seq.num_inflight = 1
    with pytest.raises(AssertionError):
        kv.release(seq)
    kv.check([seq])


def test_a_fresh_sequence_has_the_text_and_nothing_else() -> None:
    kv = cache()
    seq = computed(kv, [1, 2, 3, 4, 5])
    seq.token_ids.append(6)
    fresh = seq.fresh()
    assert fresh.token_ids == [1, 2, 3, 4, 5, 6] and fresh.num_output_tokens == 1
    assert fresh.attempt == seq.attempt and fresh.arrival == seq.arrival
    assert fresh.block_table == [] and fresh.num_missing_tokens == 6
    fresh.token_ids.append(7)
    assert seq.num_tokens == 6
    kv.check([seq])
