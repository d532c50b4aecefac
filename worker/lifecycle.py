"""The life of every attempt on this worker, from its placement to its last block's return.

    PREFILL   queue, compute in chunks, offer each chunk's blocks to the peer, commit; the
              blocks go back when the peer has them
    DECODE    reserve once the peer has begun, receive, join the batch
    WHOLE     compute here, join the batch here

Whatever ends an attempt, its blocks go back by one of two ways: at once (but not before
the steps in flight that write them), or, where the transfer is still open, when that says
that nobody reads or writes them any more. The router hears of every end that it did not
ask for itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

from ..cache.kvcache import KvCache
from ..cache.report import CacheReport
from ..cache.retired import RetiredSequences
from ..cache.sequence import Sequence
from ..core.ids import Attempt, Task
from ..core.messages import (
    MAX_LIVE,
    AttemptFailed,
    FailureKind,
    Place,
    Started,
    TokenBatch,
    TokenItem,
    ToRouter,
)
from ..core.plan import EngineLimits, KvLayout, SampledToken
from ..decode.finish import FinishRules
from ..decode.phase import DecodePhase, DecodeState
from ..kvtransfer.effects import Effect as TransferEffect
from ..kvtransfer.effects import (
    Granted,
    Pull,
    ReceiveEnded,
    Released,
    Reserve,
    Runnable,
    Send,
    SendBlocks,
    SendFailed,
    Write,
)
from ..kvtransfer.receiver import Receiver
from ..kvtransfer.sender import Sender
from ..prefill.phase import Chunk, PrefillPhase
from ..prefill.prompt import Prompt, PromptKind
from .attempts import Attempts
from .budget import Budget
from .effects import Effect, Tell
from .paces import Paces

log = logging.getLogger(__name__)


class Lifecycle:
    """``returned(seq)`` is called for every sequence that has given its blocks back.

    Effects gather until they are taken, in the order in which they must be done.
    """

    def __init__(
        self,
        budget: Budget,
        limits: EngineLimits,
        layout: KvLayout,
        sender: Sender,
        receiver: Receiver,
        returned: Callable[[Sequence], None],
        *,
        salt: bytes,
        prefix_cache: bool,
        memory_s: float,
    ) -> None:
        self._limits = limits
        self._sender = sender
        self._receiver = receiver
        self._returned = returned
        self.max_context = min(limits.max_context, layout.num_blocks * layout.block_size)
        self.attempts = Attempts(memory_s)
        self.cache = KvCache(
            layout.num_blocks, layout.block_size, salt, prefix_cache, sender.generations
        )
        self._report = CacheReport(self.cache.pool)
        self.retired = RetiredSequences(self._release)
        self.prefill = PrefillPhase(self.cache, self.retired)
        self._rules = FinishRules(frozenset(limits.eos_token_ids), self.max_context)
        self.decode = DecodePhase(
            self.cache, self.retired, self._rules, budget.max_batch, budget.growth_tokens
        )
        self.paces = Paces()
        self.draining = False
        self._num_arrivals = 0
        self._out: list[Effect] = []

    def tell(self, message: ToRouter) -> None:
        self._out.append(Tell(message))

    def take_effects(self) -> list[Effect]:
        effects, self._out = self._out, []
        return effects

    # what can be found in the cache

    def tell_cache_news(self) -> None:
        for message in self._report.news():
            self.tell(message)

    def tell_cache(self, salt: bytes | None = None) -> None:
        """All of it; under the deployment's ``salt`` where that is given."""
        if salt:
            self.cache.use_salt(salt)
        for message in self._report.everything():
            self.tell(message)

    # from the placement to the end

    def place(self, place: Place, now: float) -> None:
        attempt = place.key.attempt
        if not self.attempts.is_news(attempt):
            return
        older = self.attempts.current(attempt.request_id)
        if older is not None:
            self.end(older, "a newer attempt has been placed here", now)
        refusal = self._refusal(place)
        if refusal is not None:
            self.attempts.end(attempt, now)
            self.tell(AttemptFailed(place.key, *refusal))
            return
        self.attempts.add(place)
        tokens = [*place.prompt, *place.output]
        seq = Sequence(place.key, place.params, self._num_arrivals, len(place.prompt), tokens)
        self._num_arrivals += 1
        match place.task:
            case Task.PREFILL:
                self.prefill.add(_prompt(seq, PromptKind.TRANSFER, place, now))
            case Task.WHOLE:
                self.prefill.add(_prompt(seq, PromptKind.LOCAL, place, now))
            case Task.DECODE:
                assert place.peer is not None
                self.decode.expect(seq)
                self.absorb(self._receiver.expect(attempt, place.peer.ref, len(tokens), now), now)

    def _refusal(self, place: Place) -> tuple[FailureKind, str] | None:
        """Why this placement can't be taken, if it can't."""
        num_tokens = len(place.prompt) + len(place.output)
        largest = max(max(place.prompt), max(place.output, default=0))
        if self.draining:
            return FailureKind.DROPPED, "this worker is draining"
        if len(self.attempts) >= MAX_LIVE:
            return FailureKind.DROPPED, f"this worker has {MAX_LIVE} requests already"
        if num_tokens >= self.max_context:
            text = f"a text of {num_tokens} tokens leaves no room in {self.max_context}"
            return FailureKind.TOO_LARGE, text
        if largest >= self._limits.vocab_size:
            text = f"token {largest} is not in a vocabulary of {self._limits.vocab_size}"
            return FailureKind.TOO_LARGE, text
        if len(place.output) >= place.params.max_tokens:
            return FailureKind.INTERNAL, "the output has all the tokens it may have"
        if place.task is not Task.WHOLE and place.peer is None:
            return FailureKind.INTERNAL, f"task {place.task} names no peer"
        return None

    def abort(self, attempt: Attempt, now: float) -> None:
        """Ends this attempt, and any older one; it may never have come."""
        current = self.attempts.current(attempt.request_id)
        if current is not None and current.number <= attempt.number:
            self.end(current, "the router has aborted it", now)
        self.attempts.end(attempt, now)

    def end(self, attempt: Attempt, text: str, now: float) -> None:
        """Ends a live attempt in any state. The router is told nothing: it knows, or is told."""
        self.attempts.end(attempt, now)
        state = self.decode.state(attempt)
        seq = self.decode.remove(attempt)
        if attempt in self.prefill:
            prompt = self.prefill.remove(attempt)
            if prompt.kind is PromptKind.TRANSFER and prompt.begun:
                self.retired.lend(prompt.seq)
                self.absorb(self._sender.withdraw(attempt, now), now)
            else:
                self.retired.add(prompt.seq)
            return
        assert seq is not None, attempt
        if state is DecodeState.RUNNING:
            self.retired.add(seq)
        else:
            self.retired.lend(seq)
            self.absorb(self._receiver.abort(attempt, text, now), now)

    def end_all(self, text: str, now: float, *, but: Iterable[Attempt] = ()) -> None:
        spared = set(but)
        for key in self.attempts.live_keys():
            if key.attempt not in spared:
                self.end(key.attempt, text, now)

    def fail(self, attempt: Attempt, kind: FailureKind, text: str, now: float) -> None:
        self.tell(AttemptFailed(self.attempts.place(attempt).key, kind, text))
        self.end(attempt, text, now)

    def fail_expired(self, now: float) -> None:
        """Prompts that a peer waits for in vain give its memory back."""
        for prompt in self.prefill.expired(now):
            text = "the peer made room, but this worker found none for the prompt it had dropped"
            self.fail(prompt.attempt, FailureKind.DROPPED, text, now)

    # tokens

    def drawn(self, seq: Sequence, token: SampledToken, now: float) -> TokenItem:
        """A sequence of the batch gets its next token; the last one ends it."""
        item = self._item(seq, token)
        seq.token_ids.append(token.token_id)
        self.paces.drawn(seq, self.attempts.place(seq.attempt).tpot_ms, now)
        if item.finish is not None:
            self.paces.ended(seq)
            self.attempts.end(seq.attempt, now)
            self.decode.remove(seq.attempt)
            self.retired.add(seq)
        return item

    def drawn_for_peer(self, prompt: Prompt, token: SampledToken) -> TokenItem:
        """A prompt that is held for a peer gets the token that goes there with it."""
        prompt.token = self._item(prompt.seq, token)
        return prompt.token

    def chunk_computed(self, chunk: Chunk, now: float) -> None:
        """A chunk for a peer is done: its blocks are offered, at the end with the token."""
        prompt, seq, attempt = chunk.prompt, chunk.prompt.seq, chunk.prompt.attempt
        if not chunk.last:
            num_full = seq.num_computed_tokens // self.cache.block_size
            self.absorb(self._sender.offer(attempt, seq.block_table[:num_full], now), now)
            return
        assert prompt.token is not None
        self.prefill.computed(prompt)
        if prompt.token.finish is not None:
            self.end(attempt, "its first token was its last", now)
            return
        self.absorb(self._sender.offer(attempt, seq.block_table, now), now)
        self.absorb(self._sender.commit(attempt, prompt.token, now), now)

    def _item(self, seq: Sequence, token: SampledToken) -> TokenItem:
        """The next token of ``seq``, which does not have it yet."""
        finish = self._rules.reason(seq, token.token_id)
        index = seq.num_output_tokens
        return TokenItem(seq.key, index, token.token_id, finish, token.logprob, token.top)

    # what the transfer protocol says

    def absorb(self, effects: Iterable[TransferEffect], now: float) -> None:
        for effect in effects:
            match effect:
                case Send() | SendBlocks() | Write() | Pull():
                    self._out.append(effect)
                case Granted(attempt=attempt):
                    if attempt in self.prefill:
                        self.prefill.grant(attempt, now)
                case Released(attempt=attempt, done=done):
                    if done is not None:
                        self.tell(done)
                    self._sending_over(attempt, None, now)
                case SendFailed(attempt=attempt):
                    self._sending_over(attempt, effect, now)
                case Reserve(attempt=attempt):
                    self.decode.request(attempt)
                case Runnable(attempt=attempt, token=token):
                    self._received(attempt, token, now)
                case ReceiveEnded(attempt=attempt):
                    self._receiving_over(effect, now)

    def _sending_over(self, attempt: Attempt, failure: SendFailed | None, now: float) -> None:
        if self.retired.returned(attempt):
            return
        if failure is not None:
            key = self.attempts.place(attempt).key
            self.tell(AttemptFailed(key, failure.kind, failure.text))
        self.attempts.end(attempt, now)
        self.retired.add(self.prefill.remove(attempt).seq)

    def _receiving_over(self, ended: ReceiveEnded, now: float) -> None:
        if self.retired.returned(ended.attempt):
            return
        if ended.kind is not None:
            key = self.attempts.place(ended.attempt).key
            self.tell(AttemptFailed(key, ended.kind, ended.text))
        self.attempts.end(ended.attempt, now)
        seq = self.decode.remove(ended.attempt)
        assert seq is not None
        self.retired.add(seq)

    def _received(self, attempt: Attempt, token: TokenItem, now: float) -> None:
        """All blocks and the first token are in: it joins the batch, and says that token too."""
        seq = self.decode.received(attempt)
        self.decode.join(seq)
        log.debug("%s is runnable", attempt)
        if token.index != seq.num_output_tokens or token.token_id >= self._limits.vocab_size:
            text = f"the peer's first token is {token.token_id} at index {token.index}"
            self.fail(attempt, FailureKind.TRANSFER, text, now)
            return
        drawn = SampledToken(-1, token.token_id, token.logprob, token.top)
        self.tell(TokenBatch((self.drawn(seq, drawn, now),)))

    # room

    def grant(self, now: float) -> None:
        """Room for reservations, in their order, behind those that wait for blocks already."""
        while not self.prefill.urgent:
            reservation = self.decode.reserve()
            if reservation is None and self._standing_still:
                reservation = self.decode.reserve_lowest(
                    lambda num_blocks, above: self.retract(
                        self.prefill.make_room(num_blocks, above), now
                    )
                )
            if reservation is None:
                return
            reserved = self._receiver.reserved(
                reservation.attempt, reservation.first_block, reservation.blocks, now
            )
            self.absorb(reserved, now)

    @property
    def _standing_still(self) -> bool:
        """Whether no block will come back unless a prompt that is held for a peer is dropped."""
        return not (self.decode.frees_blocks or self.prefill.frees_blocks or self.retired)

    def spare(self, prompt: Prompt) -> int | None:
        """What a prompt that starts must leave available; None where it must wait anyhow.

        Reservations come before new prompts: somebody else's memory waits for them.
        """
        match prompt.kind:
            case PromptKind.RECOMPUTE:
                return self.decode.spare(prompt.seq)
            case PromptKind.LOCAL:
                if self.decode.num_reserving or self.decode.num_free_places <= 0:
                    return None
                return self.decode.spare(prompt.seq)
            case PromptKind.TRANSFER:
                if self.decode.num_reserving and not prompt.begun:
                    return None
                return self.decode.spare(prompt.seq, joins=False)

    def started(self, prompt: Prompt, now: float) -> None:
        """A prompt has its blocks. The router and the peer hear of that once."""
        seq, attempt = prompt.seq, prompt.attempt
        if prompt.kind is PromptKind.LOCAL:
            self.decode.take_place(seq)
        if prompt.kind is PromptKind.RECOMPUTE or prompt.dropped:
            return
        place = self.attempts.place(attempt)
        self.tell(Started(place.key, seq.num_cached_tokens))
        if prompt.kind is PromptKind.TRANSFER:
            assert place.peer is not None
            self.absorb(self._sender.start(attempt, place.peer, seq.num_tokens, now), now)

    def drop_for_growth(self, now: float) -> bool:
        """A block for a running sequence, from a prompt that is held for a peer."""
        dropped = self.prefill.make_room(1)
        self.retract(dropped, now)
        return bool(dropped)

    def retract(self, dropped: Iterable[Prompt], now: float) -> None:
        """What was offered of these prompts is gone; they will be offered anew."""
        for prompt in dropped:
            self.absorb(self._sender.offer(prompt.attempt, (), now), now)

    def sequences(self) -> set[Sequence]:
        """All that may hold blocks."""
        return {*self.retired, *self.decode, *(prompt.seq for prompt in self.prefill)}

    def check(self) -> None:
        """Asserts that every block is held by exactly the sequences that are here, and that each
        live attempt is in exactly one phase."""
        self.cache.check(self.sequences())
        for key in self.attempts.live_keys():
            in_prefill = key.attempt in self.prefill
            assert in_prefill != (self.decode.state(key.attempt) is not None), key

    def _release(self, seq: Sequence) -> None:
        self.cache.release(seq)
        self._returned(seq)


def _prompt(seq: Sequence, kind: PromptKind, place: Place, now: float) -> Prompt:
    deadline = math.inf if place.ttft_ms is None else now + place.ttft_ms / 1e3
    return Prompt(seq, kind, deadline=deadline, priority=place.priority)
