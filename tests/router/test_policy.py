"""Where a request goes, as a table."""

from __future__ import annotations

import pytest

from pdserve.core.config import Policy, PoolSection, PoolsSection
from pdserve.core.ids import Role, WorkerRef
from pdserve.router.policy import can_split, decide, missing
from pdserve.router.snapshot import Placement, Snapshot, Wish, WorkerView

ADAPTIVE, SPLIT, WHOLE = Policy.ADAPTIVE, Policy.DISAGGREGATED, Policy.COLOCATED
WISH = Wish(num_tokens=10, max_total=20)


def view(name: str, *, prefill: int = 0, kv: int = 0, requests: int = 0, **more: int) -> WorkerView:
    """A worker whose role is its first letter's."""
    role = {"p": Role.PREFILL, "d": Role.DECODE, "m": Role.MIXED}[name[0]]
    size = {"max_context": 100, "capacity": 1000} | more
    return WorkerView(
        WorkerRef(name, 1),
        role,
        prefill_tokens=prefill,
        kv_tokens=kv,
        num_requests=requests,
        **size,
    )


def names(placement: Placement | None) -> str | None:
    return placement and " ".join(worker.worker_id for worker in placement.workers)


def pools(prefill: int = 0, decode: int = 0, mixed: int = 0) -> PoolsSection:
    return PoolsSection(
        prefill=PoolSection(workers=prefill),
        decode=PoolSection(workers=decode),
        mixed=PoolSection(workers=mixed),
    )


@pytest.mark.parametrize(
    ("policy", "workers", "wish", "expected"),
    [
        (ADAPTIVE, [], WISH, None),
        (ADAPTIVE, [view("p"), view("d")], WISH, "p d"),
        (ADAPTIVE, [view("p")], WISH, "p"),
        (ADAPTIVE, [view("d")], WISH, "d"),
        (ADAPTIVE, [view("m1"), view("m2")], WISH, "m1"),
        (SPLIT, [view("m1"), view("m2")], WISH, "m2 m1"),
        (SPLIT, [view("m1")], WISH, None),
        (SPLIT, [view("p1"), view("p2")], WISH, None),
        (SPLIT, [view("p"), view("m")], WISH, "p m"),
        (SPLIT, [view("m"), view("d")], WISH, "m d"),
        (WHOLE, [view("p", prefill=5), view("d", kv=4)], WISH, "d"),
        # the least loaded, for each phase by its own measure
        (SPLIT, [view("p1", prefill=9), view("p2", prefill=3), view("d")], WISH, "p2 d"),
        (SPLIT, [view("p1", kv=90), view("p2", prefill=1), view("d")], WISH, "p1 d"),
        (SPLIT, [view("p"), view("d1", kv=50), view("d2", kv=49)], WISH, "p d2"),
        (SPLIT, [view("p"), view("d1", kv=50, capacity=2000), view("d2", kv=49)], WISH, "p d1"),
        (SPLIT, [view("p1", requests=2), view("p2", requests=1), view("d")], WISH, "p2 d"),
        # what a request asks for goes before the policy
        (WHOLE, [view("p"), view("d")], Wish(10, 20, SPLIT), "p d"),
        (SPLIT, [view("p"), view("d", kv=1)], Wish(10, 20, WHOLE), "p"),
        (SPLIT, [view("p"), view("d", kv=1)], Wish(10, 20, SPLIT, alone=True), "p"),
        # only where it fits: the prompt on the one, the whole on the other
        (SPLIT, [view("p", max_context=11), view("d")], WISH, "p d"),
        (SPLIT, [view("p", max_context=10), view("d")], WISH, None),
        (SPLIT, [view("p"), view("d1", max_context=19), view("d2", kv=99)], WISH, "p d2"),
        (ADAPTIVE, [view("p"), view("d", max_context=19)], WISH, "p"),
        (WHOLE, [view("m", max_context=20)], WISH, "m"),
        (WHOLE, [view("m", max_context=19)], WISH, None),
    ],
)
def test_decide(policy: Policy, workers: list[WorkerView], wish: Wish, expected: str) -> None:
    assert names(decide(policy, Snapshot(tuple(workers)), wish)) == expected


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (["p1 d1"], "p1 d2"),
        (["p1 d1", "p1 d2"], "p2 d1"),
        (["p1 d1", "p2 d1", "p1 d2"], "p2 d2"),
        (["p1 d1", "p2 d1", "p1 d2", "p2 d2"], "p1 d1"),  # better than none
    ],
)
def test_a_bad_link_is_the_last_choice(bad: list[str], expected: str) -> None:
    workers = (view("p1"), view("p2", prefill=1), view("d1"), view("d2"))
    if expected == "p1 d2":
        workers = (view("p1"), view("d1"), view("d2"))
    pairs = [pair.split() for pair in bad]
    links = frozenset((WorkerRef(p, 1), WorkerRef(d, 1)) for p, d in pairs)
    assert names(decide(SPLIT, Snapshot(workers, links), WISH)) == expected


@pytest.mark.parametrize(
    ("policy", "there", "text"),
    [
        (ADAPTIVE, [], "no prefill worker has joined"),
        (ADAPTIVE, [Role.PREFILL], "no decode worker has joined"),
        (ADAPTIVE, [Role.PREFILL, Role.DECODE], None),
        (WHOLE, [Role.DECODE], "no prefill worker has joined"),
        (SPLIT, [Role.DECODE], "no worker to prefill has joined"),
        (SPLIT, [Role.PREFILL], "no worker to decode has joined"),
        (SPLIT, [Role.MIXED], "only one worker has joined"),
        (SPLIT, [Role.PREFILL, Role.DECODE], None),
        (SPLIT, [Role.MIXED, Role.MIXED], None),
    ],
)
def test_what_is_missing(policy: Policy, there: list[Role], text: str | None) -> None:
    assert missing(policy, pools(prefill=1, decode=1), there) == text


def test_workers_of_other_hosts_are_enough() -> None:
    assert missing(ADAPTIVE, pools(), []) == "no worker has joined"
    assert missing(ADAPTIVE, pools(), [Role.DECODE]) is None


@pytest.mark.parametrize(
    ("prefill", "decode", "mixed", "expected"),
    [(1, 1, 0, True), (1, 0, 1, True), (0, 0, 2, True), (0, 0, 1, False), (2, 0, 0, False)],
)
def test_can_split(prefill: int, decode: int, mixed: int, expected: bool) -> None:
    assert can_split(pools(prefill, decode, mixed)) is expected
