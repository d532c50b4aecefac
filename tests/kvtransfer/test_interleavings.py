"""Both ends through random interleavings of every loss, repetition, delay and death."""

from __future__ import annotations

from functools import partial
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kv_parts import SETTINGS, attempt
from kv_world import Faults, World

from pdserve.kvtransfer.effects import Released

CALM_AT = 15.0
# after that: the longest lease, a full round of resends, tombstones, and room to spare
END = CALM_AT + SETTINGS.tombstone_s + 5 * SETTINGS.lease_s

chances = st.sampled_from([0.0, 0.02, 0.2, 0.6])


def play(
    seed: int, faults: Faults, num_transfers: int, calm_at: float = CALM_AT, arrivals: float = 5.0
) -> World:
    random = Random(seed)
    world = World(random, faults, calm_at, router_at=CALM_AT + SETTINGS.tombstone_s)
    for name in range(num_transfers):
        num_tokens, num_cached = random.randint(1, 60), random.choice([0, 0, 0, 1, 3, 99])
        tell = partial(world.tell, num_tokens, num_cached, attempt(name))
        world.later(random.uniform(0, arrivals), tell)
    world.run(END)
    world.check()
    return world


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    num_transfers=st.integers(1, 6),
    faults=st.builds(
        Faults,
        loss=chances,
        repeat=chances,
        damage=chances,
        max_delay=st.sampled_from([0.001, 0.3, 4.0, 12.0]),
        max_rim_delay=st.sampled_from([0.001, 0.3, 4.0]),
        withdraw=chances,
        abort=chances,
        disconnect=chances,
        sender_loses_peer=st.sampled_from([0.0, 0.0, 0.05]),
        receiver_loses_peer=st.sampled_from([0.0, 0.0, 0.05]),
        by_value=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    ),
)
def test_every_block_is_given_back_once_whatever_happens(
    seed: int, num_transfers: int, faults: Faults
) -> None:
    play(seed, faults, num_transfers)


media = pytest.mark.parametrize("by_value", [0.0, 1.0], ids=["by_reference", "by_value"])


@media
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), repeat=chances, max_delay=st.sampled_from([0.001, 0.9, 3.0]))
@example(seed=532072, repeat=0.0, max_delay=0.001)  # D lacks nothing
def test_delays_and_repetitions_alone_cost_no_transfer(
    by_value: float, seed: int, repeat: float, max_delay: float
) -> None:
    world = play(seed, Faults(repeat=repeat, max_delay=max_delay, by_value=by_value), 4)
    assert not (world.num_pulls if by_value else world.num_writes)
    for story in world.stories.values():
        assert story.delivered and isinstance(story.sent[0], Released)


@media
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    disconnect=st.sampled_from([0.0, 0.9]),
)
def test_an_outage_of_less_than_half_a_lease_costs_no_transfer(
    by_value: float, seed: int, loss: float, disconnect: float
) -> None:
    """All that was lost before the network is sound again is said again, and soon enough."""
    faults = Faults(loss=loss, repeat=0.2, disconnect=disconnect, by_value=by_value)
    world = play(seed, faults, 3, calm_at=4.0, arrivals=1.0)
    for story in world.stories.values():
        assert story.delivered and isinstance(story.sent[0], Released), story


@pytest.mark.parametrize("seed", range(5))
def test_without_a_network_everything_ends_all_the_same(seed: int) -> None:
    world = play(seed, Faults(loss=1.0), 4, calm_at=END)
    assert not any(story.delivered for story in world.stories.values())


def test_what_is_taken_back_during_a_copy_does_not_count() -> None:
    """Slow copies, and a sender that withdraws: the generations catch what was overwritten."""
    num_stale = 0
    for seed in range(30):
        faults = Faults(withdraw=0.9, max_rim_delay=0.5, by_value=0.0)
        num_stale += play(seed, faults, 6).num_stale
    assert num_stale > 0
