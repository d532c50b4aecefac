"""How large a chunk beside a batch may be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdserve.core.cost import PATIENCE, DecodeCost, PrefillCost, StepCost
from pdserve.prefill.pace import CREDIT, MARGIN, Pace, chunk_tokens, without_padding

COST = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5))


def test_tokens_are_due_one_after_the_other_with_a_credit_at_first() -> None:
    pace = Pace(first_token=10.0, tpot_s=0.03, short_tokens=200.0)
    assert pace.due(0) == pytest.approx(10.0 + CREDIT * 200 * 0.03)
    assert pace.due(7) - pace.due(6) == pytest.approx(MARGIN * 0.03)
    # an answer of that length that uses all of it up meets its objective
    assert pace.due(200) - 10.0 == pytest.approx(0.03 * 200)


@pytest.mark.parametrize(
    ("batch", "slack_s", "expected"),
    [
        (0, -1.0, 2048),  # nobody to disturb
        (100, 10.0, 2048),
        # a step of 29 ms: 1 of attention, and the rows' 2 + 2 + 24
        (100, 0.029, 1200),
        (100, 0.007, 100),  # what fits under the read of the weights
        (100, 0.0, 100),  # that much costs the batch nothing, late as it is
        (100, -5.0, 100),
        (10, 0.0, 145),  # fewer rows leave more
    ],
)
def test_a_chunk_fills_the_time_until_the_first_token_is_due(
    batch: int, slack_s: float, expected: int
) -> None:
    found = chunk_tokens(COST, 2048, batch, batch * 1000, slack_s, 0)
    assert found == pytest.approx(expected, abs=1)


def test_a_prompt_never_stands_still() -> None:
    nothing_free = StepCost(PrefillCost(5.0, 0.02, 0.0), DecodeCost(5.0, 0.02, 1e-5))
    assert chunk_tokens(nothing_free, 2048, 100, 100_000, -5.0, 0) == 16


def test_far_into_a_prompt_a_token_costs_more() -> None:
    cost = StepCost(PrefillCost(2.0, 0.02, 1e-6), DecodeCost(5.0, 0.01, 1e-5))
    at = [chunk_tokens(cost, 2048, 10, 10_000, 0.02, context) for context in (0, 10_000, 60_000)]
    assert at == sorted(at, reverse=True) and at[0] > 2 * at[2]


def test_where_a_small_chunk_costs_the_batch_something_prompts_wait_for_room() -> None:
    cost = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5), beside_ms=2.5)
    slacks = [(0.012, 0), (0.0101, 0), (0.0, 0), (0.0, PATIENCE - 1), (0.0, PATIENCE)]
    found = [chunk_tokens(cost, 2048, 100, 100_000, *at_) for at_ in ((s, 0, w) for s, w in slacks)]
    # a step of 12 ms: attention's 1, the 2.5, the rows' 2 + 2, and 4.5 of the chunk
    assert found[0] == pytest.approx(225, abs=1)
    assert found[1] == pytest.approx(130, abs=1)
    assert found[2:4] == [0, 0]
    assert found[4] == pytest.approx(125, abs=1)  # now and then all the same
    assert chunk_tokens(replace(cost, beside_ms=0.5), 2048, 100, 100_000, 0.0, 0) > 0


@pytest.mark.parametrize(
    ("tokens", "batch", "chunk"),
    [
        (100, 40, 88),  # 128 in all
        (88, 40, 88),
        (30, 40, 24),
        (30, 60, 68),  # 64 in all would leave four
        (20, 10, 54),  # no size is small enough
        (700, 40, 700),  # beyond the last size nothing is padded
        (0, 40, 0),
    ],
)
def test_a_chunk_ends_where_its_step_needs_no_padding(tokens: int, batch: int, chunk: int) -> None:
    assert without_padding(tokens, batch, (64, 128, 512)) == chunk
    assert without_padding(tokens, batch, ()) == tokens
