"""How the next token is drawn.

All sampling state is a pure function of (prompt ids, output ids so far, these
parameters): an attempt can be replayed on another worker and draws the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Neutral values switch a step off: top_k 0, top_p 1, min_p 0, penalties 1/0/0.

    ``temperature`` 0 is greedy. ``seed`` is always set: the router draws one for a
    request that has none. Noise is keyed by (seed, choice, position of the token in
    the output). ``logprobs`` is None for none, else how many alternatives to report.
    Stop *strings* are the router's affair: workers see tokens only.
    """

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    choice: Annotated[int, Field(ge=0, lt=2**16)] = 0
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=MAX_STOP_TOKENS)] = ()
    ignore_eos: bool = False
    logit_bias: Annotated[tuple[tuple[TokenId, float], ...], Field(max_length=MAX_LOGIT_BIAS)] = ()
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether the logits depend on the tokens that came before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
