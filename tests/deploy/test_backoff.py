"""The delay before a child is started again, as a function of its lives."""

from __future__ import annotations

from pdserve.deploy.backoff import Life, Restart, RestartPolicy

POLICY = RestartPolicy(first_s=0.5, longest_s=4.0, healthy_s=60.0, loop_lives=3)


def lives(*lengths: float, start_s: float = 0.0, from_outside: bool = False) -> list[Life]:
    """Lives that were up for these lengths, one right after the other, the last one ending at
    1000; each had taken ``start_s`` to come up."""
    ends = [
        1000.0 - sum(start_s + length for length in lengths[index + 1 :])
        for index in range(len(lengths))
    ]
    return [
        Life(end - length - start_s, end, end - length, from_outside)
        for end, length in zip(ends, lengths, strict=True)
    ]


def delays(*lengths: float) -> float:
    return POLICY.restart(1000.0, lives(*lengths)).delay


def test_the_delay_doubles_with_each_short_life() -> None:
    assert [delays(*[1.0] * count) for count in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_a_thousand_short_lives_do_not_overflow() -> None:
    assert delays(*[0.1] * 5000) == 4.0


def test_a_life_that_paid_starts_afresh() -> None:
    assert delays(1.0, 1.0, 61.0) == 0.5
    assert delays(1.0, 1.0, 61.0, 1.0) == 0.5
    assert delays(1.0, 1.0, 61.0, 1.0, 1.0) == 1.0


def test_the_delay_counts_from_the_death() -> None:
    assert POLICY.restart(1000.3, lives(1.0)).delay == 1000.5 - 1000.3
    assert POLICY.restart(1007.0, lives(1.0)).delay == 0.0


def test_a_loop_is_told_once() -> None:
    told = [POLICY.is_loop(POLICY.restart(1000.0, lives(*[1.0] * count))) for count in range(1, 7)]
    assert told == [False, False, True, False, False, False]


def test_kills_from_outside_keep_nobody_down() -> None:
    """A worker that comes up in two seconds and serves for one, over and over."""
    killed = lives(*[1.0] * 50, start_s=2.0, from_outside=True)
    assert POLICY.restart(1000.0, killed) == Restart(0.5, 0)


def test_a_start_that_fails_after_long_is_a_failed_start() -> None:
    failed = [Life(0.0, 300.0), Life(300.0, 600.0), Life(600.0, 900.0)]
    assert POLICY.is_loop(POLICY.restart(900.0, failed))
    killed = [Life(0.0, 300.0, from_outside=True)] * 3
    assert POLICY.is_loop(POLICY.restart(300.0, killed))
