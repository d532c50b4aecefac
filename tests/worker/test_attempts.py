from __future__ import annotations

from pdserve.core.ids import Attempt, Task
from pdserve.core.messages import Key, Place
from pdserve.core.params import SamplingParams
from pdserve.worker.attempts import Attempts

A, B = "a" * 32, "b" * 32


def place(request_id: str, number: int) -> Place:
    return Place(Key(request_id, number), Task.WHOLE, (1,), (), SamplingParams(max_tokens=1))


def test_only_newer_attempts_are_news() -> None:
    attempts = Attempts(memory_s=10.0)
    attempts.add(place(A, 2))
    assert not attempts.is_news(Attempt(A, 1))
    assert not attempts.is_news(Attempt(A, 2))
    assert attempts.is_news(Attempt(A, 3))
    assert attempts.is_news(Attempt(B, 0))
    assert attempts.current(A) == Attempt(A, 2) and attempts.current(B) is None
    assert Attempt(A, 2) in attempts and Attempt(A, 1) not in attempts


def test_what_is_over_stays_over() -> None:
    attempts = Attempts(memory_s=10.0)
    attempts.add(place(A, 2))
    attempts.end(Attempt(A, 2), now=0.0)
    assert len(attempts) == 0 and attempts.live_keys() == ()
    assert not attempts.is_news(Attempt(A, 2))
    assert attempts.is_news(Attempt(A, 3))
    attempts.end(Attempt(A, 1), now=1.0)  # an older one's end changes nothing
    assert not attempts.is_news(Attempt(A, 2))


def test_what_ends_before_it_comes_never_begins() -> None:
    attempts = Attempts(memory_s=10.0)
    attempts.end(Attempt(A, 0), now=0.0)
    assert not attempts.is_news(Attempt(A, 0))


def test_ending_an_older_attempt_leaves_the_live_one() -> None:
    attempts = Attempts(memory_s=10.0)
    attempts.add(place(A, 2))
    attempts.end(Attempt(A, 1), now=0.0)
    assert attempts.current(A) == Attempt(A, 2)


def test_tombstones_are_forgotten_in_time_and_bounded_in_number() -> None:
    attempts = Attempts(memory_s=10.0, max_tombstones=2)
    attempts.end(Attempt(A, 0), now=0.0)
    attempts.end(Attempt(B, 0), now=5.0)
    attempts.forget(now=9.9)
    assert not attempts.is_news(Attempt(A, 0))
    attempts.forget(now=10.0)
    assert attempts.is_news(Attempt(A, 0)) and not attempts.is_news(Attempt(B, 0))
    attempts.end(Attempt(A, 0), now=11.0)
    attempts.end(Attempt("c" * 32, 0), now=12.0)
    assert attempts.is_news(Attempt(B, 0))  # the oldest gave way


def test_a_tombstone_that_is_laid_again_lasts_from_then_on() -> None:
    attempts = Attempts(memory_s=10.0)
    attempts.end(Attempt(A, 0), now=0.0)
    attempts.end(Attempt(B, 0), now=1.0)
    attempts.end(Attempt(A, 0), now=8.0)
    attempts.forget(now=12.0)
    assert attempts.is_news(Attempt(B, 0)) and not attempts.is_news(Attempt(A, 0))
