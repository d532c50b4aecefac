"""One attempt as a worker computes it: its text, its blocks, and how far it has come.

A sequence that loses its blocks (dropped, preempted) is not emptied but replaced by a
``fresh`` one: steps in flight go on referring to the old one, whose blocks go back when
the last of them has come in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.ids import Attempt
from ..core.messages import Key
from ..core.params import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """``token_ids`` are prompt + all output so far, that of earlier attempts included.

    ``arrival`` orders the sequences of a worker by age. ``num_scheduled_tokens`` counts
    positions whose keys and values some launched step writes (or a cache or a transfer
    brought), ``num_computed_tokens`` those that are known to be in place; of the rows in
    flight, ``num_sampling`` draw a token. Of the block table the engine has been told the
    first ``num_told_blocks``.
    """

    key: Key
    params: SamplingParams
    arrival: int
    num_prompt_tokens: int
    token_ids: list[int]
    slot: int | None = None
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0
    num_stored_blocks: int = 0
    num_told_blocks: int = 0
    num_inflight: int = 0
    num_sampling: int = 0
    attempt: Attempt = field(init=False)

    def __post_init__(self) -> None:
        self.attempt = self.key.attempt

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_drawn_tokens(self) -> int:
        """The text's length once the rows in flight are read."""
        return len(self.token_ids) + self.num_sampling

    @property
    def num_missing_tokens(self) -> int:
        """Known tokens that no step has been launched for."""
        return len(self.token_ids) - self.num_scheduled_tokens

    def fresh(self) -> Sequence:
        """The same text with nothing computed: no blocks, no slot, no rows in flight."""
        return Sequence(
            key=self.key,
            params=self.params,
            arrival=self.arrival,
            num_prompt_tokens=self.num_prompt_tokens,
            token_ids=list(self.token_ids),
            block_hashes=list(self.block_hashes),
        )
