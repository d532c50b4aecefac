"""A role as a budget: how much of each phase one step may hold. All defaults are here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..core.config import PoolSection, PoolsSection
from ..core.ids import Role
from ..core.plan import EngineLimits


@dataclass(frozen=True, slots=True)
class _Defaults:
    chunk_tokens: dict[Role, int]
    max_batch: int
    prompt_slots: int


# The most there may be: beside a batch the chunks are as small as its streams need them
# (``prefill.pace``). A CPU gains nothing from long ones, and whoever hangs up waits for the step
# in flight; a decode worker's are small there, for a step takes long.
_ON_CPU = _Defaults({Role.PREFILL: 128, Role.DECODE: 64, Role.MIXED: 128}, 32, 8)
_ON_GPU = _Defaults({Role.PREFILL: 2048, Role.DECODE: 2048, Role.MIXED: 2048}, 256, 64)


@dataclass(frozen=True, slots=True)
class Budget:
    """``chunk_tokens`` new prompt tokens a step, beside a row for each of at most ``max_batch``
    running sequences; ``prompt_slots`` prompts may be computed at once besides.

    ``growth_tokens`` is how far ahead memory is kept for running sequences (see
    ``decode.phase``).
    """

    chunk_tokens: int
    max_batch: int
    prompt_slots: int
    growth_tokens: int = 128

    @staticmethod
    def of(role: Role, pool: PoolSection, *, on_gpu: bool) -> Budget:
        """What the deployment file says of this pool, or its role's default."""
        default = _ON_GPU if on_gpu else _ON_CPU
        chunk_tokens = default.chunk_tokens[role]
        return Budget(
            chunk_tokens if pool.chunk_tokens == "auto" else pool.chunk_tokens,
            default.max_batch if pool.max_batch == "auto" else pool.max_batch,
            default.prompt_slots,
        )

    @staticmethod
    def of_all(pools: PoolsSection, *, on_gpu: bool) -> dict[Role, Budget]:
        """Of every role that a worker may be given."""
        return {role: Budget.of(role, getattr(pools, role), on_gpu=on_gpu) for role in Role}

    @staticmethod
    def widest(budgets: Iterable[Budget]) -> Budget:
        """What an engine must have room for, to take any of them."""
        every = list(budgets)
        return Budget(
            max(one.chunk_tokens for one in every),
            max(one.max_batch for one in every),
            max(one.prompt_slots for one in every),
        )

    @property
    def num_slots(self) -> int:
        """The slots that an engine needs for it."""
        return self.max_batch + self.prompt_slots

    @property
    def max_step_tokens(self) -> int:
        """The largest step that it can lead to."""
        return self.max_batch + self.chunk_tokens

    def within(self, limits: EngineLimits) -> Budget:
        """Cut to what the engine can take, with a slot and a token a step left for prompts."""
        assert limits.max_slots >= 2 and limits.max_step_tokens >= 2, limits
        return replace(
            self,
            chunk_tokens=min(self.chunk_tokens, limits.max_step_tokens - 1),
            max_batch=min(self.max_batch, limits.max_slots - 1, limits.max_step_tokens - 1),
        )
