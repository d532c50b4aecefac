"""The delay before a child is started again, as a function of its lives."""

from __future__ import annotations

from pdserve.deploy.backoff import Life, RestartPolicy

POLICY = RestartPolicy(first_s=0.5, longest_s=4.0, healthy_s=60.0, loop_lives=3)


def lives(*lengths: float) -> list[Life]:
    """Lives of these lengths, one right after the other, the last one ending at 1000."""
    ends = [1000.0 - sum(lengths[index + 1 :]) for index in range(len(lengths))]
    return [Life(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def delays(*lengths: float) -> float:
    return POLICY.restart(1000.0, lives(*lengths)).delay


def test_the_delay_doubles_with_each_short_life() -> None:
    assert [delays(*[1.0] * count) for count in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 4.0, 4.0]


def test_a_thousand_short_lives_do_not_overflow() -> None:
    assert delays(*[0.1] * 5000) == 4.0


def test_a_healthy_life_starts_afresh() -> None:
    assert delays(1.0, 1.0, 61.0) == 0.5
    assert delays(1.0, 1.0, 61.0, 1.0) == 0.5
    assert delays(1.0, 1.0, 61.0, 1.0, 1.0) == 1.0


def test_the_delay_counts_from_the_death() -> None:
    assert POLICY.restart(1000.3, lives(1.0)).delay == 1000.5 - 1000.3
    assert POLICY.restart(1007.0, lives(1.0)).delay == 0.0


def test_a_loop_is_told_once() -> None:
    told = [POLICY.is_loop(POLICY.restart(1000.0, lives(*[1.0] * count))) for count in range(1, 7)]
    assert told == [False, False, True, False, False, False]
