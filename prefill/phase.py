"""The prefill phase: the queue of prompts, their chunks, and the wait for a peer.

    WAITING -> COMPUTING -> HOLDING -> (released)
       ^___________|___________|          dropped: its blocks were needed, computed again later

WAITING: in the queue; nothing is held. COMPUTING: all blocks of the prompt were claimed
at once (so a started prompt never waits for memory), the chunks go through the engine.
HOLDING: computed, the blocks wait until the peer has them. A prompt of this worker's own
batch skips HOLDING: it leaves for the decode phase.

Order: recomputed streams, then prompts that a peer has granted room for, then dropped
ones, then new ones; within each by priority, then the earliest deadline first, so that nobody
waits for ever. A prompt that is certain to miss its deadline is *demoted*: its deadline moves
by ``GRACE_S``, and those that can still make theirs go before it. Nobody is overtaken for want
of blocks: the first that doesn't fit stops all behind it. Several short prompts share a
step's budget; a long one is cut.

A peer without room does not grant, and its prompts stay here: this pool is the queue.
Where this worker's own streams need those blocks, prompts that were not granted are
dropped, the youngest first.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..cache.kvcache import KvCache
from ..cache.retired import RetiredSequences
from ..core.ids import Attempt
from .prompt import Order, Prompt, PromptKind, PromptState, Rank

GRACE_S = 5.0  # what misses its deadline is due so much later


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``num_tokens`` of a prompt, from position ``start``.

    ``last`` completes the prompt; a token is drawn after it unless one was drawn before.
    """

    prompt: Prompt
    start: int
    num_tokens: int
    last: bool

    @property
    def sample(self) -> bool:
        return self.last and self.prompt.token is None


class PrefillPhase:
    """``grant_wait_s``: how long a granted prompt that was dropped may look for blocks."""

    def __init__(
        self, cache: KvCache, retired: RetiredSequences, grant_wait_s: float = 2.0
    ) -> None:
        self._cache = cache
        self._retired = retired
        self._grant_wait_s = grant_wait_s
        self._prompts: dict[Attempt, Prompt] = {}
        self._waiting: list[Prompt] = []  # both lists in the order of ``Prompt.order``
        self._computing: list[Prompt] = []

    def __contains__(self, attempt: Attempt) -> bool:
        return attempt in self._prompts

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def computes(self) -> bool:
        """Whether any prompt is still to be computed."""
        return bool(self._waiting or self._computing)

    @property
    def urgent(self) -> bool:
        """Whether a prompt waits for blocks that comes before any new reservation."""
        return bool(self._waiting) and self._waiting[0].rank < Rank.NEW

    @property
    def frees_blocks(self) -> bool:
        """Whether prompts hold blocks that will come back without anybody's being dropped."""
        return any(
            prompt.state is not PromptState.WAITING
            and (prompt.granted or prompt.kind is not PromptKind.TRANSFER)
            for prompt in self._prompts.values()
        )

    def add(self, prompt: Prompt) -> None:
        """``prompt`` is WAITING and fits the pool; anything larger is refused before."""
        assert prompt.attempt not in self._prompts
        assert self._cache.blocks_for(prompt.seq.num_tokens) <= self._cache.num_blocks
        self._prompts[prompt.attempt] = prompt
        bisect.insort(self._waiting, prompt, key=_order)

    def remove(self, attempt: Attempt) -> Prompt:
        """Takes a prompt out in any state; what becomes of its blocks is the caller's affair."""
        prompt = self._prompts.pop(attempt)
        queue = self._queue_of(prompt)
        if queue is not None:
            queue.remove(prompt)
        return prompt

    def _queue_of(self, prompt: Prompt) -> list[Prompt] | None:
        match prompt.state:
            case PromptState.WAITING:
                return self._waiting
            case PromptState.COMPUTING:
                return self._computing
            case PromptState.HOLDING:
                return None

    def grant(self, attempt: Attempt, now: float) -> None:
        """The peer has made room: the prompt goes before those that wait for theirs."""
        prompt = self._prompts[attempt]
        queue = self._queue_of(prompt)
        if queue is None:
            prompt.granted_at = now
            return
        queue.remove(prompt)
        prompt.granted_at = now
        bisect.insort(queue, prompt, key=_order)

    def demote(self, now: float, seconds: Callable[[Prompt], float]) -> None:
        """Those that can't make their deadline even if they were computed at once, which takes
        ``seconds``, step behind those that can. What peers wait for goes on as it is."""
        late = [
            prompt
            for prompt in self._waiting + self._computing
            if prompt.rank is Rank.NEW
            and not prompt.late
            and now + seconds(prompt) > prompt.deadline
        ]
        for prompt in late:
            prompt.deadline += GRACE_S
            prompt.late = True
        if late:
            self._waiting.sort(key=_order)
            self._computing.sort(key=_order)

    @property
    def first(self) -> Prompt | None:
        """The prompt whose chunk comes next, if memory allows."""
        heads = self._computing[:1] + self._waiting[:1]
        return min(heads, key=_order, default=None)

    def expired(self, now: float) -> list[Prompt]:
        """Granted prompts that have found no blocks in time.

        Two workers that have dropped each other's prompts for each other's sake would
        wait for ever, each with the room that the other one needs.
        """
        return [
            prompt
            for prompt in self._waiting
            if prompt.granted_at is not None and now >= prompt.granted_at + self._grant_wait_s
        ]

    def schedule(
        self,
        max_tokens: int,
        max_starts: int,
        spare: Callable[[Prompt], int | None],
        started: Callable[[Prompt], None],
    ) -> tuple[list[Chunk], list[Prompt]]:
        """The chunks of the next step, and the prompts that were dropped for them.

        ``max_tokens`` bounds the chunks together, ``max_starts`` the prompts that leave the
        queue. ``spare(prompt)`` is how many blocks must stay available beside those of this
        prompt, or None where it can't start now whatever the memory; ``started`` is told at
        once, for it may change what the next one must spare.
        """
        chunks: list[Chunk] = []
        dropped: list[Prompt] = []
        candidates = self._computing + self._waiting[: max(0, max_starts)]
        if self._computing and self._waiting:
            candidates.sort(key=_order)
        memory_left = True
        for prompt in candidates:
            if max_tokens <= 0:
                break
            if prompt.state is PromptState.WAITING:
                room = spare(prompt) if memory_left else None
                if room is None:
                    continue
                memory_left = self._start(prompt, room, dropped)
                if not memory_left:
                    continue
                started(prompt)
            seq = prompt.seq
            num_tokens = min(max_tokens, seq.num_missing_tokens)
            if num_tokens:
                last = num_tokens == seq.num_missing_tokens
                chunks.append(Chunk(prompt, seq.num_scheduled_tokens, num_tokens, last))
                max_tokens -= num_tokens
        return chunks, dropped

    def computed(self, prompt: Prompt) -> None:
        """Its last chunk is done: it is held for its peer, or leaves for the batch."""
        assert prompt.state is PromptState.COMPUTING and prompt.seq.num_missing_tokens == 0
        if prompt.kind is PromptKind.TRANSFER:
            self._computing.remove(prompt)
            prompt.state = PromptState.HOLDING
        else:
            self.remove(prompt.attempt)

    def make_room(self, num_blocks: int, above: str = "") -> list[Prompt]:
        """Drops prompts, the youngest first, until ``num_blocks`` are available.

        None are dropped where all of them would not do. With ``above`` only requests whose
        id is greater are dropped: where two workers would drop for each other, the order
        of ids lets just one do so.
        """
        victims = [p for p in self._prompts.values() if p.droppable]
        if above:
            victims = [p for p in victims if p.attempt.request_id > above]
        victims.sort(key=_age)
        within_reach = sum(len(p.seq.block_table) for p in victims)
        if self._cache.num_available + within_reach < num_blocks:
            return []
        dropped = []
        while victims and self._cache.num_available < num_blocks:
            prompt = victims.pop()
            self._drop(prompt)
            dropped.append(prompt)
        return dropped

    def _start(self, prompt: Prompt, spare: int, dropped: list[Prompt]) -> bool:
        """Claims all blocks of a waiting prompt; only one that others wait for may drop others."""
        if not self._cache.claim(prompt.seq, spare):
            if prompt.rank not in (Rank.RECOMPUTE, Rank.GRANTED):
                return False
            if prompt.granted:
                spare = 0  # memory is set aside for it elsewhere
            dropped += self.make_room(self._cache.blocks_for(prompt.seq.num_tokens) + spare)
            if not self._cache.claim(prompt.seq, spare):
                return False
        self._waiting.remove(prompt)
        prompt.state = PromptState.COMPUTING
        bisect.insort(self._computing, prompt, key=_order)
        return True

    def _drop(self, prompt: Prompt) -> None:
        if prompt.state is PromptState.COMPUTING:
            self._computing.remove(prompt)
        self._retired.add(prompt.seq)
        prompt.seq = prompt.seq.fresh()
        prompt.state = PromptState.WAITING
        prompt.dropped = True
        bisect.insort(self._waiting, prompt, key=_order)


def _order(prompt: Prompt) -> Order:
    return prompt.order


def _age(prompt: Prompt) -> int:
    return prompt.seq.arrival
