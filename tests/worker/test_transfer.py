"""A prefill worker P and a decode worker D, joined by queues that keep only their own order."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from worker_net import MODEL, Net, Request, Shape, Worker

from pdserve.core.ids import Task
from pdserve.core.messages import (
    Abort,
    AttemptFailed,
    FailureKind,
    FinishReason,
    Key,
    Place,
    Started,
    TokenBatch,
    TokenItem,
)
from pdserve.core.params import SamplingParams
from pdserve.decode.phase import DecodeState
from pdserve.kvtransfer.effects import Send, SendBlocks
from pdserve.kvtransfer.messages import Chunk, Commit, Starting
from pdserve.prefill.prompt import PromptState
from pdserve.worker.effects import Effect, Tell

PROMPT = tuple(range(2, 25))  # 23 tokens: 5 full blocks and three quarters of a sixth


def request(
    number: int = 1,
    prompt: tuple[int, ...] = PROMPT,
    sender: str = "p",
    receiver: str = "d",
    **params: Any,
) -> Request:
    sampling = SamplingParams(**{"max_tokens": 6, "ignore_eos": True, **params})
    expected = MODEL.expected_tokens(prompt, (), sampling, 48 - len(prompt))
    return Request(f"{number:032x}", prompt, sampling, expected, sender, receiver)


def pair(seed: int = 0, p: Shape | None = None, d: Shape | None = None) -> Net:
    return Net([Worker("p", p or Shape()), Worker("d", d or Shape())], random.Random(seed))


def items(worker: Worker) -> list[TokenItem]:
    return [item for told in worker.told if isinstance(told, TokenBatch) for item in told.items]


def failures(worker: Worker) -> list[AttemptFailed]:
    return [told for told in worker.told if isinstance(told, AttemptFailed)]


@pytest.mark.parametrize("seed", range(10))
def test_p_says_token_0_and_d_says_all_of_them(seed: int) -> None:
    net = pair(seed)
    net.submit(request())
    net.run()
    p, d = net.workers["p"], net.workers["d"]
    assert p.told_of(Started) == [Started(items(p)[0].key, 0)]
    assert [item.index for item in items(p)] == [0]
    assert [item.index for item in items(d)] == [0, 1, 2, 3, 4, 5]
    assert items(d)[0] == items(p)[0]
    assert items(d)[-1].finish is FinishReason.LENGTH
    assert net.failures.total() == 0


@pytest.mark.parametrize("seed", range(10))
def test_where_token_0_is_the_last_d_gives_everything_back(seed: int) -> None:
    net = pair(seed)
    net.submit(request(max_tokens=1))
    net.run()
    assert len(items(net.workers["p"])) == 1 and items(net.workers["d"]) == []
    assert net.failures.total() == 0


@pytest.mark.parametrize("seed", range(5))
def test_log_probabilities_travel_with_token_0(seed: int) -> None:
    net = pair(seed)
    net.submit(request(logprobs=3))
    net.run()
    first = items(net.workers["d"])[0]
    assert first.logprob is not None and len(first.top) == 3
    assert first == items(net.workers["p"])[0]


@pytest.mark.parametrize("seed", range(5))
def test_what_d_has_in_its_cache_is_not_sent_again(seed: int) -> None:
    net = pair(seed)
    net.submit(request(1, sender="d", receiver="d"))
    net.run()
    sent: list[Chunk] = []
    spy_on_messages(net, lambda message: sent.append(message) if _is(message, Chunk) else None)
    net.submit(request(2))
    net.run()
    assert sent and min(chunk.first_block for chunk in sent) == 5


@pytest.mark.parametrize("seed", range(5))
def test_all_of_a_prompt_may_be_in_ds_cache(seed: int) -> None:
    net = pair(seed)
    prompt = PROMPT[:20]  # five whole blocks
    net.submit(request(1, prompt, sender="d", receiver="d"))
    net.run()
    sent: list[Chunk] = []
    spy_on_messages(net, lambda message: sent.append(message) if _is(message, Chunk) else None)
    net.submit(request(2, prompt))
    net.run()
    assert sent == []
    assert len(items(net.workers["d"])) == 6 + 6


def test_blocks_leave_while_the_prompt_is_still_being_computed() -> None:
    net = pair()
    order: list[str] = []
    spy_on_messages(net, lambda message: order.append(type(message).__name__))
    net.submit(request())
    net.deliver_all()
    while net.plan("p"):
        net.complete("p")
        net.deliver_all()
    assert order.index("Chunk") < order.index("Commit")
    assert [name for name in order if name in ("Chunk", "Commit")].count("Chunk") >= 3
    net.run()


def test_p_holds_what_d_has_no_room_for() -> None:
    """P's memory is the queue: D's overflows neither with blocks nor with places."""
    net = pair(p=Shape(num_blocks=40), d=Shape(num_blocks=8))
    for number in range(4):
        net.submit(request(number, tuple(range(number, number + 23)), max_tokens=5))
    p, d = net.workers["p"], net.workers["d"]
    net.deliver_all()
    while net.plan("p"):
        net.complete("p")
        net.deliver_all()
    assert p.core.blocks.held == 3 * 6  # three are computed and wait
    assert d.core.blocks.held <= 8
    assert d.core.beat().waiting == 3
    net.run()
    assert net.failures.total() == 0


def test_a_text_that_p_says_otherwise_about_is_not_taken() -> None:
    net = pair()
    wanted = request()
    net.submit(wanted)
    d = net.workers["d"]
    key = Key.of(wanted.attempt)
    d.core.router_message(place_for_d(net, wanted), 0.0)
    effects = d.core.receiver_message(net.workers["p"].ref, Starting(key, 99), (), 0.0)
    assert [e.message.kind for e in told(effects)] == [FailureKind.TRANSFER]  # type: ignore[union-attr]
    d.core.check()
    assert d.core.blocks.held == 0 and d.core.beat().live == ()


@pytest.mark.parametrize("index, token_id", [(1, 5), (0, 64)])
def test_a_first_token_that_makes_no_sense_fails_the_attempt(index: int, token_id: int) -> None:
    net = pair()
    wanted = request(prompt=(2, 3, 4))
    d, p = net.workers["d"], net.workers["p"]
    key = Key.of(wanted.attempt)
    d.core.router_message(place_for_d(net, wanted), 0.0)
    d.core.receiver_message(p.ref, Starting(key, 3), (), 0.0)
    frame = memoryview(bytes(d.engine.kv.layout.block_bytes))
    d.core.receiver_message(p.ref, Chunk(key, 0, 1), (frame,), 0.0)
    d.core.written(wanted.attempt, 0, True, 0.0)
    effects = d.core.receiver_message(
        p.ref, Commit(key, 3, TokenItem(key, index, token_id)), (), 0.0
    )
    assert [e.message.kind for e in told(effects)] == [FailureKind.TRANSFER]  # type: ignore[union-attr]
    d.core.check()
    assert d.core.blocks.held == 0 and d.core.beat().live == ()


def test_a_shorter_context_at_d_ends_the_answer_there() -> None:
    net = pair(p=Shape(max_context=48), d=Shape(max_context=24))
    wanted = request()
    del wanted.expected[1:]
    net.submit(wanted)
    net.run()
    assert [item.finish for item in items(net.workers["p"])] == [None]
    assert [item.finish for item in items(net.workers["d"])] == [FinishReason.LENGTH]


# memory that several want


def compute_all(net: Net, name: str) -> None:
    """All steps that a worker has, without a word from or to its peers."""
    while net.plan(name):
        net.complete(name)
    net.hear(name)


@pytest.mark.parametrize("seed", range(10))
def test_two_workers_full_of_prompts_for_each_other_do_not_lock_up(seed: int) -> None:
    """Each pool holds a prompt that the other one has no room for; one of them gives way."""
    shape = Shape(num_blocks=8, max_context=32)
    net = Net([Worker("a", shape), Worker("b", shape)], random.Random(seed))
    there = request(1, tuple(range(2, 28)), "a", "b", max_tokens=5)
    back = request(2, tuple(range(12, 38)), "b", "a", max_tokens=5)
    for wanted in (there, back):
        net.submit(wanted)
        net.deliver_all()
    if seed % 2:
        for name in "ab":
            compute_all(net, name)
    else:
        assert net.plan("a") and net.plan("b")
    assert [worker.core.blocks.held for worker in net.workers.values()] == [7, 7]
    net.run()
    assert there.text == there.expected and back.text == back.expected
    assert net.failures.total() == 0  # dropped and recomputed, but not given up


def test_a_running_stream_takes_the_blocks_of_prompts_held_for_others() -> None:
    net = pair(p=Shape(num_blocks=10))
    stream = request(1, (2, 3, 4), "p", "p", max_tokens=24)
    held = request(2, tuple(range(12, 36)))
    p = net.workers["p"]
    for wanted in (stream, held):
        net.submit(wanted)
    net.deliver_all()
    compute_all(net, "p")  # D hears nothing: the prompt can't be granted
    assert len(items(p)) == 24 + 1
    assert p.core.beat().waiting == 0 and p.core.blocks.held == 6  # computed once more
    net.run()
    assert stream.text == stream.expected and held.text == held.expected
    assert len([told for told in p.told if isinstance(told, Started)]) == 2


def test_a_preempted_stream_comes_back_before_anybody_new_gets_room() -> None:
    net = pair(d=Shape(num_blocks=6, max_batch=4, prefix_cache=False))
    d, p = net.workers["d"], net.workers["p"]
    old = request(1, (2, 3, 4), "d", "d", max_tokens=18)
    young = request(2, tuple(range(12, 23)), "d", "d", max_tokens=12)
    for wanted in (old, young):
        net.submit(wanted)
    net.deliver_all()
    while d.core.beat().running < 2 or d.core.blocks.held < 6:
        assert net.plan("d")
        net.complete("d")
    while d.core.beat().running == 2:
        net.plan("d")
        net.complete("d")
    assert d.core.beat().waiting == 1 and d.core.blocks.held == 3  # three are free
    newcomer = request(3, (5, 6))
    d.core.router_message(place_for_d(net, newcomer), net.now)
    d.core.receiver_message(p.ref, Starting(Key.of(newcomer.attempt), 2), (), net.now)
    assert d.core.beat().waiting == 2 and d.core.blocks.held == 3  # it would fit, and waits
    net.do(d, d.core.router_message(Abort(Key.of(newcomer.attempt)), net.now))
    net.run()
    assert old.text == old.expected and young.text == young.expected


def test_a_reservation_comes_before_a_new_prompt_of_ds_own() -> None:
    """Even one that would fit beside it: P's blocks are held until D has room."""
    net = pair(d=Shape(num_blocks=8))
    running = request(1, tuple(range(12, 24)), "d", "d", max_tokens=4)
    own, coming = request(2, (4,), "d", "d"), request(3)
    d = net.workers["d"]
    net.submit(running)
    net.deliver_all()
    assert net.plan("d")
    net.submit(coming)
    net.deliver_all()
    assert net.plan("p")
    net.submit(own)
    net.deliver_all()
    assert d.core.beat().waiting == 2 and d.core.blocks.held == 3
    net.complete("d")
    compute_all(net, "d")
    last = next(item for item in items(d) if item.finish is not None)
    ended = next(told for told in d.told if isinstance(told, TokenBatch) and last in told.items)
    assert last.key == Key.of(running.attempt)
    assert d.told.index(Started(Key.of(own.attempt), 0)) > d.told.index(ended)
    net.run()


def test_token_0_is_told_before_anything_else_is_done_with_it() -> None:
    net = pair()
    wanted = request(prompt=(2, 3, 4))
    net.submit(wanted)
    net.deliver_all()
    p = net.workers["p"]
    assert net.plan("p")
    net.deliver_all()  # granted by now
    first, *others = p.core.complete(p.steps.popleft().wait(), net.now)
    assert isinstance(first, Tell) and isinstance(first.message, TokenBatch)
    assert [type(effect) for effect in others] == [SendBlocks, Send]
    for effect in others:
        net.do(p, [effect])
    wanted.output[0] = first.message.items[0].token_id
    net.run()


# an abort in each state


def prefill_state(net: Net, state: PromptState, granted: bool = False) -> bool:
    return any(
        prompt.state is state and prompt.granted == granted
        for prompt in net.workers["p"].core._life.prefill
    )


def decode_state(net: Net, wanted: Request, state: DecodeState, asked: bool = True) -> bool:
    decode = net.workers["d"].core._life.decode
    return decode.state(wanted.attempt) is state and bool(decode.num_reserving) == asked


STATES: dict[str, tuple[bool, Callable[[Net, Request], bool]]] = {
    "P waiting": (False, lambda net, _: prefill_state(net, PromptState.WAITING)),
    "P computing": (False, lambda net, _: prefill_state(net, PromptState.COMPUTING)),
    "P computing, granted": (False, lambda net, _: prefill_state(net, PromptState.COMPUTING, True)),
    "P holding": (True, lambda net, _: prefill_state(net, PromptState.HOLDING)),
    "P holding, granted": (False, lambda net, _: prefill_state(net, PromptState.HOLDING, True)),
    "D placed": (False, lambda net, r: decode_state(net, r, DecodeState.RESERVING, False)),
    "D reserving": (True, lambda net, r: decode_state(net, r, DecodeState.RESERVING)),
    "D receiving": (False, lambda net, r: decode_state(net, r, DecodeState.RECEIVING, False)),
    "D running": (False, lambda net, r: decode_state(net, r, DecodeState.RUNNING, False)),
}


@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("state", STATES)
def test_an_abort_in_each_state_gives_everything_back(state: str, max_inflight: int) -> None:
    d_is_full, reached = STATES[state]
    num_reached = 0
    for seed in range(12):
        shape = Shape(max_inflight=max_inflight, max_batch=1)
        net = pair(seed, shape, shape)
        hog = request(9, tuple(range(30, 50)), "d", "d", max_tokens=28)
        if d_is_full:  # the batch's one place is taken
            net.submit(hog)
            while net.workers["d"].core.beat().running == 0:
                net.step()
        wanted = request()
        net.submit(wanted)
        for _ in range(5_000):
            if reached(net, wanted):
                break
            if not net.step():
                net.tick()
        num_reached += reached(net, wanted)
        net.abort(wanted)
        net.run()
        for worker in net.workers.values():
            assert worker.core.blocks.held == 0
        assert set(net.failures) <= {FailureKind.DROPPED}  # one end's word on the other's abort
        assert not d_is_full or hog.text == hog.expected
    assert num_reached >= 3, state


@pytest.mark.parametrize("seed", range(20))
def test_an_abort_at_one_end_only_ends_the_other_too(seed: int) -> None:
    """The router's word to the other worker may be lost with its connection."""
    net = pair(seed)
    wanted = request()
    net.submit(wanted)
    for _ in range(seed * 3):
        net.step()
    end = net.workers["pd"[seed % 2]]
    wanted.done = True
    net.do(end, end.core.router_message(Abort(Key.of(wanted.attempt)), net.now))
    net.run()


# deaths


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dead", ["p", "d"])
def test_the_death_of_either_is_a_failure_that_is_told_and_replayed(dead: str, seed: int) -> None:
    net = pair(seed)
    wanted = request(max_tokens=12)
    net.submit(wanted)
    for _ in range(seed * 3):
        net.step()
    net.restart(dead)
    net.run()
    assert wanted.text == wanted.expected
    assert set(net.failures) <= {FailureKind.PEER_LOST, FailureKind.DROPPED}


@pytest.mark.parametrize("seed", range(10))
def test_without_a_router_both_ends_come_to_rest(seed: int) -> None:
    net = pair(seed)
    for number in range(3):
        net.submit(request(number))
    for _ in range(seed * 6):
        net.step()
    net.router_restarts()
    net.run()


def test_a_silent_peer_is_given_up_after_its_lease() -> None:
    net = pair()
    wanted = request()
    net.submit(wanted)
    p = net.workers["p"]
    net.deliver_all()
    net.lossy = 1.0
    while net.plan("p"):
        net.complete("p")
    net.deliver_all()
    assert p.core.blocks.held == 6
    while p.core.blocks.held:
        assert net.now < 11.0
        net.tick()
        net.deliver_all()
    assert [failed.kind for failed in failures(p)] == [FailureKind.TRANSFER]
    net.lossy = 0.0
    net.run()
    assert wanted.text == wanted.expected and wanted.num_replays == 1


def place_for_d(net: Net, wanted: Request) -> Place:
    peer = net.workers[wanted.sender].address
    return Place(Key.of(wanted.attempt), Task.DECODE, wanted.prompt, (), wanted.params, peer)


def told(effects: list[Effect]) -> list[Tell]:
    return [effect for effect in effects if isinstance(effect, Tell)]


def _is(message: object, kind: type) -> bool:
    return isinstance(message, kind)


def spy_on_messages(net: Net, see: Callable[[Any], None]) -> None:
    """``see`` gets each message between workers as it leaves."""
    net.spies.append(see)
