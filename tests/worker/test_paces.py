"""When a worker's streams are due their tokens."""

from __future__ import annotations

import math

import pytest
import sequences

from pdserve.prefill.pace import CREDIT, MARGIN
from pdserve.worker.paces import Paces


def test_the_stream_that_is_least_ahead_sets_the_slack() -> None:
    paces = Paces()
    first, second, free = (sequences.sequence(8) for _ in range(3))
    for seq, tpot_ms, now in ((first, 100.0, 1.0), (second, 50.0, 2.0), (free, None, 2.0)):
        seq.token_ids.append(7)
        paces.drawn(seq, tpot_ms, now)
    credit = CREDIT * 128.0
    assert paces.slack_s([free], 2.0) == math.inf
    assert paces.slack_s([first], 1.0) == pytest.approx(0.1 * (MARGIN + credit))
    assert paces.slack_s([first, second, free], 2.0) == pytest.approx(0.1 * (MARGIN + credit) - 1.0)
    assert paces.slack_s([second, free], 2.0) == pytest.approx(0.05 * (MARGIN + credit))
    second.num_sampling = 1  # a step in flight draws the token before
    assert paces.slack_s([second], 2.0) == pytest.approx(0.05 * (2 * MARGIN + credit))


def test_the_answers_that_end_teach_how_long_they_are() -> None:
    paces = Paces()
    for _ in range(1000):
        ended = sequences.sequence(8)
        ended.token_ids.extend([7] * 10)
        paces.ended(ended)
    begun = sequences.sequence(8)
    begun.token_ids.append(7)
    paces.drawn(begun, 100.0, 0.0)
    assert paces.slack_s([begun], 0.0) == pytest.approx(0.1 * (MARGIN + CREDIT * 10), rel=0.02)
