"""When an output is over, as far as tokens can tell. Stop strings are the router's affair."""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.sequence import Sequence
from ..core.messages import FinishReason


@dataclass(frozen=True, slots=True)
class FinishRules:
    """``max_context`` bounds prompt and output together; the last token needs no KV."""

    eos_token_ids: frozenset[int]
    max_context: int

    def reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        """Why the output ends with ``token_id`` as the next token of ``seq``, if it does."""
        params = seq.params
        if token_id in self.eos_token_ids and not params.ignore_eos:
            return FinishReason.STOP
        if token_id in params.stop_token_ids:
            return FinishReason.STOP
        if self.ends_by_length(seq, seq.num_tokens + 1):
            return FinishReason.LENGTH
        return None

    def ends_by_length(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether ``seq`` would draw no more tokens with a text of ``num_tokens``."""
        num_output_tokens = num_tokens - seq.num_prompt_tokens
        return num_output_tokens >= seq.params.max_tokens or num_tokens >= self.max_context
