from __future__ import annotations

import random

import pytest

from pdserve.core.lengths import AnswerLengths


def test_answers_of_one_length_hold_half_of_it_on_average() -> None:
    lengths = AnswerLengths()
    assert lengths.mean == 256.0
    for _ in range(2000):
        lengths.ended(100)
    assert lengths.mean == pytest.approx(100, rel=0.01)
    assert lengths.mean_running == pytest.approx(50, rel=0.02)


def test_the_mean_of_a_batch_is_that_of_who_is_in_it() -> None:
    """A batch in which each place is refilled at once, looked at at random moments."""
    rng = random.Random(3)
    lengths = AnswerLengths()
    held = []
    for _ in range(4000):
        length = rng.choice([10, 400])
        lengths.ended(length)
        held += [index for index in range(length) if rng.random() < 0.01]
    assert lengths.mean_running == pytest.approx(sum(held) / len(held), rel=0.1)


def test_a_new_kind_of_answer_is_learned() -> None:
    lengths = AnswerLengths()
    for _ in range(1000):
        lengths.ended(50)
    for _ in range(600):
        lengths.ended(500)
    assert lengths.mean == pytest.approx(500, rel=0.15)


def test_nine_in_ten_are_longer_than_short() -> None:
    lengths = AnswerLengths()
    assert lengths.short == 128.0
    for index in range(1000):
        lengths.ended(10 + index % 100)
    assert lengths.short == pytest.approx(20, abs=6)


def test_short_answers_count_after_a_handful_long_ones_only_in_time() -> None:
    lengths = AnswerLengths()
    for _ in range(1000):
        lengths.ended(500)
    for _ in range(8):
        lengths.ended(60)
    assert lengths.short == 60
    for _ in range(200):
        lengths.ended(60)
    for _ in range(100):
        lengths.ended(500)
    assert lengths.short == 60
