"""What is done to messages on purpose: lists go in and come out, and the time is a number."""

from __future__ import annotations

import math
import random

from pdserve.core.config import DisturbanceSection
from pdserve.core.disturbance import MAX_HELD, Disturbance, Fate


def disturbance(seed: int = 1, *, in_order: bool = False, **rates: float) -> Disturbance[int]:
    return Disturbance(DisturbanceSection(**rates), random.Random(seed), in_order=in_order)


def all_of(link: Disturbance[int], num: int) -> list[int]:
    """A message a second, and then all that is still held back."""
    out = []
    for number in range(num):
        out += link.due(float(number))
        out += link.take(number, float(number))
    out += link.due(math.inf)
    assert link.next_due == math.inf
    return out


def test_without_rates_everything_goes_on_and_no_number_is_drawn() -> None:
    rng = random.Random(1)
    before = rng.getstate()
    link: Disturbance[int] = Disturbance(DisturbanceSection(), rng)
    assert all_of(link, 50) == list(range(50))
    assert rng.getstate() == before and not link.fates.total()


def test_what_is_dropped_is_gone_and_counted() -> None:
    link = disturbance(drop=0.3)
    out = all_of(link, 1000)
    assert out == sorted(set(out)) and 600 < len(out) < 800
    assert link.fates == {Fate.DROPPED: 1000 - len(out), Fate.DOUBLED: 0}


def test_what_is_doubled_comes_twice_at_once_or_late() -> None:
    link = disturbance(duplicate=1.0, delay_ms=5000.0)
    out = all_of(link, 100)
    assert sorted(out) == sorted([*range(100), *range(100)])
    assert out[0:2] != [0, 0] or out != sorted(out)  # some copies come behind later messages


def test_what_is_delayed_is_overtaken_unless_in_order() -> None:
    free = all_of(disturbance(delay=0.5, delay_ms=5000.0), 200)
    assert free != list(range(200)) and sorted(free) == list(range(200))
    bound = disturbance(in_order=True, delay=0.5, delay_ms=5000.0)
    assert all_of(bound, 200) == list(range(200)) and bound.fates[Fate.DELAYED] > 50


def test_it_says_when_something_is_due_and_gives_it_then() -> None:
    link = disturbance(delay=1.0, delay_ms=1000.0)
    assert link.take(7, 10.0) == []
    due = link.next_due
    assert 10.0 < due <= 11.0
    assert link.due(due - 0.001) == [] and link.due(due) == [7]


def test_the_seed_fixes_the_draws() -> None:
    rates = {"drop": 0.1, "duplicate": 0.2, "delay": 0.3, "delay_ms": 3000.0}
    one, same, other = (all_of(disturbance(seed, **rates), 300) for seed in (4, 4, 5))
    assert one == same != other


def test_what_is_held_back_is_bounded() -> None:
    link = disturbance(delay=1.0, delay_ms=1000.0)
    for number in range(MAX_HELD + 10):
        link.take(number, 0.0)
    assert len(link.due(math.inf)) == MAX_HELD and link.fates[Fate.DROPPED] == 10
