"""The router's map of prefixes, fed by the reports of real caches."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.cache.hashing import BlockHasher
from pdserve.cache.kvcache import KvCache
from pdserve.cache.report import CacheReport
from pdserve.cache.sequence import Sequence
from pdserve.core.ids import WorkerRef
from pdserve.core.messages import HASH_BYTES, CacheEvents, Key
from pdserve.core.params import SamplingParams
from pdserve.router.prefix_map import _STRIDE, ASK_EVERY_S, PrefixMap

SIZE = 4
SALT = b"of the deployment"


class Cached:
    """A worker's cache with its report, and what the map is told of it."""

    def __init__(self, name: str, epoch: int = 1, num_blocks: int = 8, max_names: int = 3) -> None:
        self.ref = WorkerRef(name, epoch)
        self.cache = KvCache(num_blocks, SIZE, SALT)
        self.report = CacheReport(self.cache.pool, max_names)
        self.salt = SALT
        self._count = 0

    def compute(self, tokens: list[int]) -> None:
        """As a request that comes and goes."""
        self._count += 1
        key = Key(f"{self._count:032x}", 1)
        seq = Sequence(key, SamplingParams(max_tokens=1), self._count, len(tokens), list(tokens))
        assert self.cache.claim(seq)
        seq.num_computed_tokens = len(tokens)
        self.cache.store(seq)
        self.cache.release(seq)

    def holds(self, tokens: list[int]) -> int:
        """What it would find of this prompt."""
        names: list[bytes] = []
        BlockHasher(SIZE, self.salt).extend(names, tokens, (len(tokens) - 1) // SIZE)
        found = [self.cache.pool.find(name) is not None for name in names]
        return SIZE * (found.index(False) if False in found else len(found))


def joined(prefixes: PrefixMap, *workers: Cached) -> None:
    for worker in workers:
        prefixes.joined(worker.ref, SIZE)
        hear(prefixes, worker, worker.report.everything())


def hear(
    prefixes: PrefixMap, worker: Cached, messages: list[CacheEvents], now: float = 0.0
) -> bool:
    """Whether no message made the map ask for more."""
    answers = [prefixes.heard(worker.ref, message, now) for message in messages]
    return all(answers)


texts = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=4 * SIZE + 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("ab"), texts), max_size=30), st.integers(0, 99))
def test_the_map_is_what_the_caches_hold_whatever_is_lost(
    asked: list[tuple[str, list[int]]], seed: int
) -> None:
    rng = random.Random(seed)
    prefixes = PrefixMap(SALT)
    workers = {name: Cached(name) for name in "ab"}
    joined(prefixes, *workers.values())
    now = 0.0
    for name, tokens in asked:
        now += ASK_EVERY_S
        worker = workers[name]
        worker.compute(tokens)
        news = [message for message in worker.report.news() if rng.random() > 0.2]
        if not hear(prefixes, worker, news, now):
            assert hear(prefixes, worker, worker.report.everything(), now)
    for worker in workers.values():
        prefixes.heard(worker.ref, CacheEvents(2**40, b"", b""), now + ASK_EVERY_S)  # a gap
        assert prefixes.num_blocks(worker.ref) == 0
        assert hear(prefixes, worker, worker.report.everything(), now)
    for _, tokens in asked:
        expected = {w.ref: w.holds(tokens) for w in workers.values()}
        found = prefixes.cached_tokens(tokens, [])
        assert found == {ref: count for ref, count in expected.items() if count}


def test_a_text_is_named_only_as_far_as_somebody_holds_it() -> None:
    prefixes = PrefixMap(SALT)
    a, b = Cached("a", num_blocks=64), Cached("b", num_blocks=64)
    joined(prefixes, a, b)
    text = list(range(40 * SIZE))
    a.compute(text[: 20 * SIZE])
    b.compute(text[: _STRIDE * SIZE])
    for worker in (a, b):
        hear(prefixes, worker, worker.report.news())
    names: list[bytes] = []
    expected = {a.ref: 20 * SIZE, b.ref: _STRIDE * SIZE}
    assert prefixes.cached_tokens(text, names) == expected
    assert 20 < len(names) <= 20 + _STRIDE
    assert prefixes.cached_tokens(text, names) == expected  # by the names that are known now
    new: list[bytes] = []
    assert prefixes.cached_tokens([-1, *text], new) == {} and len(new) == _STRIDE


def test_what_ends_takes_its_part_along_and_comes_back_with_nothing() -> None:
    prefixes = PrefixMap(SALT)
    a, b = Cached("a"), Cached("b")
    joined(prefixes, a, b)
    prompt = list(range(9))
    for worker in (a, b):
        worker.compute(prompt)
        hear(prefixes, worker, worker.report.news())
    b.compute(list(range(13)))
    hear(prefixes, b, b.report.news())
    assert prefixes.cached_tokens(list(range(13)), []) == {a.ref: 8, b.ref: 12}
    prefixes.gone(a.ref)
    again = Cached("a", epoch=2)
    joined(prefixes, again)
    assert prefixes.cached_tokens(prompt, []) == {b.ref: 8}
    prefixes.heard(a.ref, CacheEvents(9, b"x" * HASH_BYTES, b""), 0.0)  # late words of the dead
    prefixes.gone(b.ref)
    assert len(prefixes) == 0 and prefixes.cached_tokens(prompt, []) == {}


def test_a_gap_is_asked_about_once_a_while() -> None:
    prefixes = PrefixMap(SALT)
    worker = Cached("a")
    prefixes.joined(worker.ref, SIZE)
    assert not prefixes.heard(worker.ref, CacheEvents(5, b"", b""), 0.0)
    assert prefixes.heard(worker.ref, CacheEvents(6, b"", b""), ASK_EVERY_S / 2)
    assert not prefixes.heard(worker.ref, CacheEvents(7, b"", b""), ASK_EVERY_S)


@pytest.mark.parametrize("max_blocks", [4, 32])
def test_a_full_map_forgets_what_was_used_least_recently(max_blocks: int) -> None:
    prefixes = PrefixMap(SALT, max_blocks)
    worker = Cached("a", num_blocks=64)
    joined(prefixes, worker)
    hot = [7] * SIZE
    worker.compute(hot)
    for number in range(40):
        worker.compute([number] * SIZE)
        hear(prefixes, worker, worker.report.news())
        assert len(prefixes) <= max_blocks
        assert prefixes.num_blocks(worker.ref) == len(prefixes)
        assert prefixes.cached_tokens([*hot, 0], []) == {worker.ref: SIZE}


def test_a_new_salt_leaves_nothing_to_be_found() -> None:
    worker = Cached("a")
    worker.compute(list(range(9)))
    worker.cache.use_salt(SALT)
    assert worker.holds(list(range(9))) == 8
    worker.salt = b"another"
    worker.cache.use_salt(worker.salt)
    worker.cache.check([])
    assert worker.holds(list(range(9))) == 0
    (message,) = worker.report.everything()
    assert message == CacheEvents(0, b"", b"", reset=True)
