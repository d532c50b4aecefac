"""Any order of events, on one worker and on two, with tiny pools and everything that can go wrong.

Every token must be that of the undisturbed answer, every request must end, and when all is
quiet no block is held anywhere. The order of events is drawn from a seed; what the workers
are like and what is asked of them, from hypothesis.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from worker_net import MODEL, Net, Request, Shape, Worker

from pdserve.core.ids import Role
from pdserve.core.messages import FailureKind
from pdserve.core.params import SamplingParams

CONTEXT = 48

shapes = st.builds(
    Shape,
    num_blocks=st.sampled_from([12, 14, 20]),  # of 4 tokens: one or two requests' worth
    max_context=st.just(CONTEXT),
    max_batch=st.sampled_from([1, 2, 4]),
    max_slots=st.sampled_from([5, 8]),
    chunk_tokens=st.sampled_from([3, 6, 20]),
    growth_tokens=st.sampled_from([0, 4, 16]),
    max_inflight=st.sampled_from([1, 2]),
    prefix_cache=st.booleans(),
    by_reference=st.booleans(),
)


@dataclass(frozen=True, slots=True)
class Order:
    """What a client asks for, and how many events pass before the next one comes."""

    prompt: tuple[int, ...]
    params: SamplingParams
    route: str  # the sender's name and the receiver's
    id: int
    wait: int


def orders(routes: list[str]) -> st.SearchStrategy[list[Order]]:
    params = st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 30),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 9),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (7,)]),
    )
    order = st.builds(
        Order,
        # few different tokens: prompts begin alike, and the caches have something to do
        prompt=st.lists(st.integers(2, 3), min_size=1, max_size=40).map(tuple),
        params=params,
        route=st.sampled_from(routes),
        id=st.integers(0, 2**128 - 1),
        wait=st.integers(0, 60),
    )
    return st.lists(order, min_size=1, max_size=8, unique_by=lambda order: order.id)


def request(order: Order) -> Request:
    room = CONTEXT - len(order.prompt)
    expected = MODEL.expected_tokens(order.prompt, (), order.params, room)
    sender, receiver = order.route
    name = f"{order.id:032x}"
    return Request(name, order.prompt, order.params, expected, sender, receiver)


def net_of(shapes: list[Shape], seed: int) -> Net:
    workers = [Worker(name, shape) for name, shape in zip("ab", shapes, strict=False)]
    return Net(workers, random.Random(seed))


def wait(net: Net, num_events: int) -> None:
    for _ in range(num_events):
        if not net.step():
            net.tick()


def all_answered(net: Net) -> None:
    for answered in net.requests.values():
        assert answered.text == answered.expected


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes, orders(["aa"]), seeds)
def test_one_worker(shape: Shape, ordered: list[Order], seed: int) -> None:
    net = net_of([shape], seed)
    for order in ordered:
        net.submit(request(order))
        wait(net, order.wait)
    net.run()
    all_answered(net)
    assert net.failures.total() == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shapes, shapes, orders(["ab"]), seeds)
def test_a_prefill_and_a_decode_worker(p: Shape, d: Shape, ordered: list[Order], seed: int) -> None:
    net = net_of([p, d], seed)
    for order in ordered:
        net.submit(request(order))
        wait(net, order.wait)
    net.run()
    all_answered(net)
    assert net.failures.total() == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shapes, shapes, orders(["ab", "ba", "aa", "bb"]), seeds)
def test_two_workers_that_do_everything_for_each_other(
    a: Shape, b: Shape, ordered: list[Order], seed: int
) -> None:
    """Each may hold what the other has no room for: nothing locks up."""
    net = net_of([a, b], seed)
    for order in ordered:
        net.submit(request(order))
        wait(net, order.wait)
    net.run()
    all_answered(net)
    assert set(net.failures) <= {FailureKind.DROPPED}


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    shapes,
    shapes,
    orders(["ab", "ba", "aa", "bb"]),
    seeds,
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.1]),
)
def test_hang_ups_deaths_bad_links_and_other_roles(
    a: Shape, b: Shape, ordered: list[Order], seed: int, lossy: float, damaging: float
) -> None:
    net = net_of([a, b], seed)
    net.lossy, net.damaging = lossy, damaging
    aborted = set()
    for order in ordered:
        net.submit(request(order))
        wait(net, order.wait)
        match net.rng.choice(
            ["nothing", "nothing", "hang up", "death", "beat", "new router", "role"]
        ):
            case "hang up":
                victim = net.rng.choice(list(net.requests.values()))
                net.abort(victim)
                aborted.add(victim.request_id)
            case "death":
                net.restart(net.rng.choice("ab"))
            case "beat":
                net.beat()
            case "role":
                net.give_role(net.rng.choice("ab"), net.rng.choice(list(Role)))
            case "new router" if net.rng.random() < 0.3:
                net.router_restarts()
                aborted |= set(net.requests)
    net.run()
    for answered in net.requests.values():
        if answered.request_id not in aborted:
            assert answered.text == answered.expected
