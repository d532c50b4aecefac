"""The seam between deciding and computing: plain data in, token ids out.

A scheduler hands the engine a ``StepPlan``. The engine keeps one *slot* a sequence:
its token ids, block table and sampling parameters. A plan says only what changed,
so that a decode step of 256 sequences is 256 short rows and the engine updates its
device arrays in place. Sampled tokens are written into the slot by the engine
itself: the next step can be launched before the last one's tokens are read.

The engine knows no requests and no sockets; this module knows no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import ConfigDict, Field

from .generations import Generations
from .ids import Medium
from .params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewSequence:
    """Fills a slot, whatever it held before. ``token_ids`` are prompt + output so far.

    ``block_table`` lists the sequence's blocks so far, in order.
    """

    slot: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    params: SamplingParams
    block_table: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of one slot to run through the model in this step.

    Computes positions ``start .. start + num_tokens - 1`` and writes their keys and
    values; positions before ``start`` are in the slot's blocks already. A decode row
    has ``num_tokens == 1`` and ``sample``, and its input token may be one that an
    earlier, still unread step sampled. ``new_blocks`` is appended to the slot's block
    table first. With ``sample`` the token at position ``start + num_tokens`` is drawn
    (and written to the slot); a chunk that is not the prompt's last has it False.
    """

    slot: int
    start: int
    num_tokens: int
    new_blocks: tuple[int, ...] = ()
    sample: bool = True


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: every row runs once, in one batch. A slot has one row at the most.

    Rows are ordered: decode rows first, then chunks.
    """

    new: tuple[NewSequence, ...]
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A drawn token; the log-probabilities are of the unmodified distribution (log-softmax
    of the raw logits), present where ``SamplingParams.logprobs`` asks for them."""

    slot: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """One ``SampledToken`` for each row with ``sample``, in the rows' order."""

    tokens: tuple[SampledToken, ...]


class StepHandle(Protocol):
    """A launched step."""

    def wait(self) -> StepResult:
        """Blocks until the step is done; a second call returns the same result."""
        ...

    @property
    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        ...


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The shape of a KV pool: ``[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]``.

    Two pools can exchange blocks where everything but ``num_blocks`` is equal.
    """

    num_blocks: int
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    block_bytes: int


@dataclass(frozen=True, slots=True)
class PoolExport:
    """By what a peer on the same host finds this pool, to read it by itself: no pointer.

    ``name`` and ``nonce`` are of the shared memory that holds the generations, and for
    ``shm`` the blocks too. ``handle`` (CUDA's, 64 bytes) is of the device memory in which
    the blocks begin at ``offset``, and ``nonce`` stands behind the last of them again.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    medium: Medium
    name: Annotated[str, Field(max_length=128)]
    nonce: Annotated[bytes, Field(min_length=16, max_length=16)]
    num_blocks: Annotated[int, Field(ge=1, lt=2**31)]
    handle: Annotated[bytes, Field(max_length=64)] = b""
    offset: Annotated[int, Field(ge=0, lt=2**53)] = 0


class PeerPool(Protocol):
    """A peer's pool, mapped into this process. Several threads may copy from shared memory; of
    another pool all calls but the waiting come from one thread at a time."""

    @property
    def generations(self) -> Generations: ...

    @property
    def owner_gone(self) -> bool:
        """Whether the peer's process has ended; its memory stays until ``close``."""
        ...

    def begin(self, theirs: Sequence[int], ours: Sequence[int]) -> Callable[[], None]:
        """Begins to fill blocks of our own pool; call what it returns, once, to wait until the
        bytes are in place. Soon over itself."""
        ...

    def copy(self, theirs: Sequence[int], ours: Sequence[int]) -> None:
        """``begin``, and the wait."""
        ...

    def close(self) -> None:
        """Unmaps it. No copy is under way."""
        ...


class KvPool(Protocol):
    """Blocks as bytes, for the transfer layer. Called from any thread; the caller owns the
    blocks it names: no step that is running or launched touches them."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def generations(self) -> Generations:
        """Of its blocks; who hands blocks out counts them up."""
        ...

    @property
    def exports(self) -> tuple[PoolExport, ...]:
        """The ways by which a peer on this host may read it, the fastest first."""
        ...

    def attach(self, export: PoolExport) -> PeerPool:
        """Maps a peer's pool, to copy from it; HandshakeRefused, with the reason, where that
        does not work from here. The layouts are known to agree."""
        ...

    def read(self, blocks: Sequence[int]) -> list[memoryview]:
        """One view of ``block_bytes`` bytes a block (a copy where the pool is on a device).

        On a CPU the view aliases the pool: the caller must be done with it before the
        block is written again.
        """
        ...

    def read_runs(self, blocks: Sequence[int]) -> list[memoryview]:
        """Like ``read``, with one view for blocks that lie one behind the other."""
        ...

    def write(self, blocks: Sequence[int], data: Sequence[memoryview]) -> None:
        """Fills whole blocks, each from equally many pieces; returns when the bytes are in
        place."""
        ...

    def zero_tail(self, block: int, num_tokens: int) -> None:
        """Zeroes the block past its first ``num_tokens`` tokens, in every layer."""
        ...

    def close(self) -> None:
        """Peers find it no more."""
        ...


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the schedulers must stay within. ``max_inflight`` steps may be launched and unread.

    ``step_sizes``, ascending: a step of another number of tokens, up to the last of them, takes
    as long as one of the next.
    """

    max_slots: int
    max_context: int
    max_step_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_inflight: int = 1
    step_sizes: tuple[int, ...] = ()


class Engine(Protocol):
    """Runs steps in the order they are launched."""

    @property
    def kv(self) -> KvPool: ...

    @property
    def limits(self) -> EngineLimits: ...

    def launch(self, plan: StepPlan) -> StepHandle:
        """Starts a step. On a CPU it may compute at once; on a GPU it returns early."""
        ...

    def close(self) -> None: ...
