"""Who is a worker of ours: lives, links and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdserve.core.ids import Role, WorkerRef
from pdserve.core.messages import (
    PROTOCOL_VERSION,
    BlockCounts,
    Hello,
    PeerAddress,
    Refused,
    WorkerBeat,
)
from pdserve.router.effects import Link
from pdserve.router.membership import (
    DEAD_AFTER_S,
    FORGET_AFTER_S,
    MAX_MEMBERS,
    Joined,
    Membership,
    MemberState,
)

BLOCKS = BlockCounts(8, 8, 0, 0)


def hello(name: str = "w", epoch: int = 1, **changes: object) -> Hello:
    made = Hello(
        PROTOCOL_VERSION,
        Role.MIXED,
        77,
        PeerAddress(name, epoch, "tcp://127.0.0.1:9", "token"),
        "model/bf16/16",
        BLOCKS,
        16,
        128,
        4,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def beat(held: int = 0) -> WorkerBeat:
    return WorkerBeat(BlockCounts(8, 8 - held, 0, held), 1, 2, ())


def link(name: str = "a", socket: int = 0) -> Link:
    return Link(socket, name.encode())


def refusal(found: object) -> Refused:
    assert isinstance(found, Refused)
    return found


def test_a_worker_joins_beats_and_is_listed() -> None:
    members = Membership("model")
    ref = WorkerRef("w", 1)
    assert members.hello(link(), hello(), 0.0) == Joined(ref, new=True)
    assert members.speaker(link()) is members.get(ref)
    member = members.beat(link(), beat(held=3), 1.0)
    assert member is members.get(ref)
    assert (member.blocks.held, member.waiting, member.running) == (3, 1, 2)
    assert member.capacity == 128
    assert [one.ref for one in members] == [ref]


def test_hello_again_changes_only_the_link() -> None:
    members = Membership("model")
    members.hello(link("a"), hello(), 0.0)
    members.beat(link("a"), beat(held=2), 1.0)
    assert members.hello(link("b"), hello(), 2.0) == Joined(WorkerRef("w", 1), new=False)
    member = members.get(WorkerRef("w", 1))
    assert member is not None and member.blocks.held == 2 and member.link == link("b")
    assert members.speaker(link("a")) is None
    assert refusal(members.beat(link("a"), beat(), 2.0)).rejoin  # nobody known


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": PROTOCOL_VERSION + 1}, f"protocol {PROTOCOL_VERSION + 1}"),
        ({"fingerprint": "other/bf16/16"}, "another model"),
        ({"fingerprint": "model/fp32/16"}, r"differ from the others' \(model/fp32/16, model/bf16"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_for_good(
    changes: dict[str, object], text: str
) -> None:
    members = Membership("model")
    members.hello(link("a"), hello("other"), 0.0)
    found = refusal(members.hello(link("b"), hello("w", **changes), 0.0))
    assert not found.rejoin
    assert text.replace("\\", "") in found.text
    assert members.get(WorkerRef("w", 1)) is None


def test_the_first_worker_sets_the_block_shape() -> None:
    members = Membership("model")
    assert isinstance(members.hello(link(), hello(fingerprint="model/fp32/8"), 0.0), Joined)


def test_a_new_epoch_takes_the_place_of_the_old() -> None:
    members = Membership("model")
    members.hello(link("a"), hello(epoch=1), 0.0)
    joined = members.hello(link("b"), hello(epoch=2), 1.0)
    assert joined == Joined(WorkerRef("w", 2), True, replaced=WorkerRef("w", 1))
    assert members.get(WorkerRef("w", 1)) is None
    # the old one is still about: it is not to come back, or the two would take turns
    assert not refusal(members.beat(link("a"), beat(), 1.1)).rejoin
    assert not refusal(members.hello(link("a"), hello(epoch=1), 1.2)).rejoin
    assert members.get(WorkerRef("w", 2)) is not None


def test_silence_is_death_and_the_dead_must_rejoin() -> None:
    members = Membership("model")
    members.hello(link(), hello(epoch=1), 0.0)
    assert members.silent(DEAD_AFTER_S) == []
    assert members.silent(DEAD_AFTER_S + 0.1) == [WorkerRef("w", 1)]
    members.lost(WorkerRef("w", 1))
    assert members.silent(DEAD_AFTER_S + 0.1) == []
    assert [one.state for one in members] == [MemberState.DEAD]
    assert members.alive() == [] and members.speaker(link()) is None
    assert refusal(members.beat(link(), beat(), 6.0)).rejoin
    assert refusal(members.hello(link(), hello(epoch=1), 6.0)).rejoin
    assert members.hello(link(), hello(epoch=2), 7.0) == Joined(WorkerRef("w", 2), new=True)


def test_a_beat_without_hello_is_asked_for_one() -> None:
    found = refusal(Membership("model").beat(link(), beat(), 0.0))
    assert found.rejoin and "hello" in found.text


def test_goodbye_leaves_nothing() -> None:
    members = Membership("model")
    members.hello(link(), hello(), 0.0)
    members.bye(WorkerRef("w", 1))
    assert list(members) == []
    assert refusal(members.hello(link(), hello(), 1.0)).rejoin


def test_the_dead_are_forgotten_in_time() -> None:
    members = Membership("model")
    members.hello(link(), hello(), 0.0)
    members.lost(WorkerRef("w", 1))
    members.forget(FORGET_AFTER_S)
    assert len(list(members)) == 1
    members.forget(FORGET_AFTER_S + 1)
    assert list(members) == []


def test_the_same_name_on_two_sockets_is_two_links() -> None:
    members = Membership("model")
    members.hello(link("a", 0), hello("x"), 0.0)
    members.hello(link("a", 1), hello("y"), 0.0)
    first, second = members.speaker(link("a", 0)), members.speaker(link("a", 1))
    assert first is not None and second is not None
    assert (first.ref.worker_id, second.ref.worker_id) == ("x", "y")


def test_there_is_a_last_worker() -> None:
    members = Membership("model")
    for index in range(MAX_MEMBERS):
        members.hello(link(str(index)), hello(str(index)), 0.0)
    assert "joined already" in refusal(members.hello(link("x"), hello("x"), 0.0)).text
    assert isinstance(members.hello(link("7b"), hello("7", epoch=2), 0.0), Joined)
