from __future__ import annotations

import pytest
import sequences

from pdserve.core.messages import FinishReason
from pdserve.decode.finish import FinishRules

RULES = FinishRules(frozenset({0, 1}), max_context=20)
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.mark.parametrize("token_id, reason", [(0, STOP), (1, STOP), (7, STOP), (5, None)])
def test_end_tokens_and_stop_tokens_end_an_output(
    token_id: int, reason: FinishReason | None
) -> None:
    seq = sequences.sequence(4, stop_token_ids=(7,))
    assert RULES.reason(seq, token_id) is reason


def test_end_tokens_can_be_ignored_but_stop_tokens_can_not() -> None:
    seq = sequences.sequence(4, stop_token_ids=(1,), ignore_eos=True)
    assert RULES.reason(seq, 0) is None
    assert RULES.reason(seq, 1) is STOP


def test_max_tokens_counts_the_output_of_earlier_attempts() -> None:
    assert RULES.reason(sequences.sequence(4, [5], max_tokens=3), 5) is None
    assert RULES.reason(sequences.sequence(4, [5, 5], max_tokens=3), 5) is LENGTH


def test_prompt_and_output_end_with_the_context() -> None:
    assert RULES.reason(sequences.sequence(10, [5] * 8), 5) is None
    assert RULES.reason(sequences.sequence(10, [5] * 9), 5) is LENGTH


def test_an_end_token_at_the_very_end_is_a_stop() -> None:
    assert RULES.reason(sequences.sequence(4, [5, 5], max_tokens=3), 0) is STOP


def test_ends_by_length_are_known_beforehand() -> None:
    seq = sequences.sequence(4, [5], max_tokens=3)
    assert [RULES.ends_by_length(seq, num_tokens) for num_tokens in (5, 6, 7)] == [
        False,
        False,
        True,
    ]
