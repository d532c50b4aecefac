"""A worker without its sockets, threads and tensors: messages and results in, effects out.

    PREFILL   queue, compute in chunks, offer each chunk's blocks to the peer, say token 0,
              commit; the blocks go back when the peer has them
    DECODE    reserve when the peer has begun, receive, join the batch, say the tokens
    WHOLE     compute here, join the batch here

The core composes the two phases, the two ends of the transfer protocol and the pool. Its
caller does the effects in order, calls ``plan`` when a step may be launched and anything
has happened since, and ``complete`` with each step's result, in the order of launching.

Whatever ends an attempt, its blocks go back by one of two ways: at once (but not before
the steps in flight that write them), or, where the transfer is still open, when that says
that nobody reads or writes them any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from ..cache.kvcache import KvCache
from ..cache.retired import RetiredSequences
from ..cache.sequence import Sequence
from ..core.ids import Attempt, Task, WorkerRef
from ..core.messages import (
    MAX_LIVE,
    Abort,
    AttemptFailed,
    BlockCounts,
    Bye,
    Drain,
    FailureKind,
    FinishReason,
    Key,
    Place,
    Refused,
    RouterBeat,
    Started,
    TokenBatch,
    TokenItem,
    ToRouter,
    ToWorker,
    Welcome,
    WorkerBeat,
)
from ..core.plan import EngineLimits, KvLayout, NewSequence, Row, SampledToken, StepPlan, StepResult
from ..decode.finish import FinishRules
from ..decode.phase import DecodePhase, DecodeState
from ..kvtransfer.effects import Effect as TransferEffect
from ..kvtransfer.effects import (
    Granted,
    ReceiveEnded,
    Released,
    Reserve,
    Runnable,
    Send,
    SendChunk,
    SendFailed,
    Write,
)
from ..kvtransfer.messages import ToReceiver, ToSender
from ..kvtransfer.receiver import Receiver
from ..kvtransfer.sender import Sender
from ..prefill.phase import Chunk, PrefillPhase
from ..prefill.prompt import Prompt, PromptKind
from .attempts import Attempts
from .budget import Budget
from .effects import Effect, Tell

TICK_S = 0.25  # how often ``tick`` wants to be called, at the least


@dataclass(frozen=True, slots=True)
class _PlannedRow:
    """A row of a launched step; ``chunk`` is None for one of the running batch."""

    seq: Sequence
    row: Row
    chunk: Chunk | None


class WorkerCore:
    """One worker's decisions. ``salt`` keys its block hashes: one a deployment.

    ``memory_s`` must outlive the longest lease: so long an attempt that is over stays so.
    """

    def __init__(
        self,
        budget: Budget,
        limits: EngineLimits,
        layout: KvLayout,
        sender: Sender,
        receiver: Receiver,
        *,
        salt: bytes,
        prefix_cache: bool = True,
        memory_s: float = 120.0,
    ) -> None:
        self._limits = limits
        self._budget = budget.within(limits)
        self._sender = sender
        self._receiver = receiver
        self._attempts = Attempts(memory_s)
        self._cache = KvCache(layout.num_blocks, layout.block_size, salt, prefix_cache)
        self._retired = RetiredSequences(self._release)
        self._rules = FinishRules(frozenset(limits.eos_token_ids), self.max_context)
        self._prefill = PrefillPhase(self._cache, self._retired)
        self._decode = DecodePhase(
            self._cache, self._retired, self._rules, self.max_batch, budget.growth_tokens
        )
        self._slots = list(range(limits.max_slots - 1, -1, -1))
        self._steps: deque[tuple[_PlannedRow, ...]] = deque()
        self._num_arrivals = 0
        self._draining = False
        self._drained = False
        self._out: list[Effect] = []

    # what the worker publishes

    @property
    def max_context(self) -> int:
        """Tokens of prompt and output together that a request may have here."""
        pool_tokens = self._cache.num_blocks * self._cache.block_size
        return min(self._limits.max_context, pool_tokens)

    @property
    def max_batch(self) -> int:
        return self._budget.max_batch

    @property
    def blocks(self) -> BlockCounts:
        return self._cache.counts()

    @property
    def num_inflight(self) -> int:
        """Steps that are launched and not completed."""
        return len(self._steps)

    @property
    def drained(self) -> bool:
        """Told to drain, everything finished, Bye said."""
        return self._drained

    def beat(self) -> WorkerBeat:
        """What goes to the router every half second; it is over for the router if not in it."""
        return WorkerBeat(
            blocks=self.blocks,
            waiting=self._prefill.num_waiting + self._decode.num_reserving,
            running=self._decode.num_running,
            live=self._attempts.live_keys(),
        )

    # what comes in

    def router_message(self, message: ToWorker, now: float) -> list[Effect]:
        match message:
            case Place():
                self._place(message, now)
            case Abort(key=key):
                self._abort(key.attempt, now)
            case RouterBeat(live=live):
                listed = set(live)
                for key in self._attempts.live_keys():
                    if key not in listed:
                        self._end(key.attempt, "the router has given it up", now)
            case Drain():
                self._draining = True
            case Welcome() | Refused():
                pass  # between the router and the socket's owner
        return self._settled(now)

    def receiver_message(
        self, peer: WorkerRef, message: ToReceiver, frames: Listing[memoryview], now: float
    ) -> list[Effect]:
        """From a peer that has dialled in: it sends, this worker receives."""
        self._absorb(self._receiver.receive(peer, message, frames, now), now)
        return self._settled(now)

    def sender_message(self, peer: WorkerRef, message: ToSender, now: float) -> list[Effect]:
        """From a peer that this worker has dialled: it receives, this worker sends."""
        self._absorb(self._sender.receive(peer, message, now), now)
        return self._settled(now)

    def sent(self, attempt: Attempt, first_block: int, now: float) -> list[Effect]:
        """The blocks of that ``SendChunk`` are read no more, whether they left or not."""
        self._absorb(self._sender.sent(attempt, first_block, now), now)
        return self._settled(now)

    def written(self, attempt: Attempt, first_block: int, ok: bool, now: float) -> list[Effect]:
        """That ``Write`` is done; not ``ok`` where a checksum did not match."""
        self._absorb(self._receiver.written(attempt, first_block, ok, now), now)
        return self._settled(now)

    def peer_lost(self, peer: WorkerRef, text: str, now: float) -> list[Effect]:
        """The other worker is dead, or its socket was given up."""
        self._absorb(self._sender.peer_lost(peer, text, now), now)
        self._absorb(self._receiver.peer_lost(peer, text, now), now)
        return self._settled(now)

    def router_lost(self, now: float) -> list[Effect]:
        """Nobody is left who wants an answer: everything ends."""
        for key in self._attempts.live_keys():
            self._end(key.attempt, "the router is gone", now)
        return self._settled(now)

    def tick(self, now: float) -> list[Effect]:
        """Time has passed: leases, resends, beats between peers, tombstones."""
        self._absorb(self._sender.tick(now), now)
        self._absorb(self._receiver.tick(now), now)
        for prompt in self._prefill.expired(now):
            text = "the peer made room, but this worker found none for the prompt it had dropped"
            self._fail(prompt.attempt, FailureKind.DROPPED, text, now)
        self._attempts.forget(now)
        return self._settled(now)

    # steps

    def plan(self, now: float) -> tuple[StepPlan | None, list[Effect]]:
        """The next step to launch; None where there is nothing to run or enough in flight."""
        if len(self._steps) >= self._limits.max_inflight:
            return None, []
        rows: list[_PlannedRow] = []
        new: list[NewSequence] = []
        running, preempted = self._decode.schedule(lambda: self._make_room(now))
        for seq in preempted:
            self._prefill.add(Prompt(seq, PromptKind.RECOMPUTE))
        for seq in running:
            if seq.slot is not None or self._slots:
                rows.append(self._planned(seq, 1, None, new))
        self._grant(now)
        chunks, dropped = self._prefill.schedule(
            min(self._budget.chunk_tokens, self._limits.max_step_tokens - len(rows)),
            len(self._slots),
            self._spare,
            lambda prompt: self._started(prompt, now),
        )
        self._retract(dropped, now)
        rows += [self._planned(c.prompt.seq, c.num_tokens, c, new) for c in chunks]
        if not rows:
            return None, self._settled(now)
        self._steps.append(tuple(rows))
        return StepPlan(tuple(new), tuple(planned.row for planned in rows)), self._settled(now)

    def complete(self, result: StepResult, now: float) -> list[Effect]:
        """The oldest launched step is done."""
        tokens = iter(result.tokens)
        items: list[TokenItem] = []
        chunks: list[Chunk] = []
        for planned in self._steps.popleft():
            seq, row = planned.seq, planned.row
            drawn = next(tokens) if row.sample else None
            assert drawn is None or drawn.slot == row.slot
            seq.num_inflight -= 1
            if seq in self._retired:
                self._retired.row_read(seq)
                continue
            seq.num_computed_tokens = row.start + row.num_tokens
            if drawn is not None:
                seq.num_sampling -= 1
            self._cache.store(seq)
            if planned.chunk is not None and planned.chunk.prompt.kind is PromptKind.TRANSFER:
                if drawn is not None:
                    planned.chunk.prompt.token = self._item(seq, drawn)
                    items.append(planned.chunk.prompt.token)
                chunks.append(planned.chunk)
                continue
            if planned.chunk is not None and planned.chunk.last:
                self._prefill.computed(planned.chunk.prompt)
                self._decode.join(seq)
            if drawn is not None:
                items.append(self._item(seq, drawn))
                seq.token_ids.append(drawn.token_id)
                if items[-1].finish is not None:
                    self._finish(seq.attempt, now)
        if items:
            self._tell(TokenBatch(tuple(items)))
        for chunk in chunks:
            self._hand_over(chunk, now)
        return self._settled(now)

    def check(self) -> None:
        """Asserts that every block is accounted for: by exactly the sequences that are here."""
        sequences = {*self._retired, *self._decode, *(prompt.seq for prompt in self._prefill)}
        self._cache.check(sequences)
        slots = [seq.slot for seq in sequences if seq.slot is not None]
        assert sorted(slots + self._slots) == list(range(self._limits.max_slots))
        for key in self._attempts.live_keys():
            prefilling = key.attempt in self._prefill
            assert prefilling != (self._decode.state(key.attempt) is not None), key

    # the life of an attempt

    def _place(self, place: Place, now: float) -> None:
        attempt = place.key.attempt
        if not self._attempts.is_news(attempt):
            return
        older = self._attempts.current(attempt.request_id)
        if older is not None:
            self._end(older, "a newer attempt has been placed here", now)
        refusal = self._refusal(place)
        if refusal is not None:
            self._attempts.end(attempt, now)
            self._tell(AttemptFailed(place.key, *refusal))
            return
        self._attempts.add(place)
        seq = Sequence(
            attempt=attempt,
            params=place.params,
            arrival=self._num_arrivals,
            num_prompt_tokens=len(place.prompt),
            token_ids=[*place.prompt, *place.output],
        )
        self._num_arrivals += 1
        match place.task:
            case Task.PREFILL:
                self._prefill.add(Prompt(seq, PromptKind.TRANSFER))
            case Task.WHOLE:
                self._prefill.add(Prompt(seq, PromptKind.LOCAL))
            case Task.DECODE:
                assert place.peer is not None
                self._decode.expect(seq)
                expected = self._receiver.expect(attempt, place.peer.ref, seq.num_tokens, now)
                self._absorb(expected, now)

    def _refusal(self, place: Place) -> tuple[FailureKind, str] | None:
        """Why this placement can't be taken, if it can't."""
        num_tokens = len(place.prompt) + len(place.output)
        largest = max(max(place.prompt), max(place.output, default=0))
        if self._draining:
            return FailureKind.DROPPED, "this worker is draining"
        if len(self._attempts) >= MAX_LIVE:
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

    def _abort(self, attempt: Attempt, now: float) -> None:
        """Ends this attempt, and any older one; it may never have come."""
        current = self._attempts.current(attempt.request_id)
        if current is not None and current.number <= attempt.number:
            self._end(current, "the router has aborted it", now)
        self._attempts.end(attempt, now)

    def _end(self, attempt: Attempt, text: str, now: float) -> None:
        """Ends a live attempt in any state. The router is told nothing: it knows, or is told."""
        self._attempts.end(attempt, now)
        state = self._decode.state(attempt)
        seq = self._decode.remove(attempt)
        if attempt in self._prefill:
            prompt = self._prefill.remove(attempt)
            if prompt.kind is PromptKind.TRANSFER and prompt.begun:
                self._retired.lend(prompt.seq)
                self._absorb(self._sender.withdraw(attempt, now), now)
            else:
                self._retired.add(prompt.seq)
            return
        assert seq is not None, attempt
        if state is DecodeState.RUNNING:
            self._retired.add(seq)
        else:
            self._retired.lend(seq)
            self._absorb(self._receiver.abort(attempt, text, now), now)

    def _fail(self, attempt: Attempt, kind: FailureKind, text: str, now: float) -> None:
        self._tell(AttemptFailed(self._attempts.place(attempt).key, kind, text))
        self._end(attempt, text, now)

    def _finish(self, attempt: Attempt, now: float) -> None:
        """The running sequence has drawn its last token."""
        self._attempts.end(attempt, now)
        seq = self._decode.remove(attempt)
        assert seq is not None
        self._retired.add(seq)

    # what the transfer protocol says

    def _absorb(self, effects: Iterable[TransferEffect], now: float) -> None:
        for effect in effects:
            match effect:
                case Send() | SendChunk() | Write():
                    self._out.append(effect)
                case Granted(attempt=attempt):
                    if attempt in self._prefill:
                        self._prefill.grant(attempt, now)
                case Released(attempt=attempt):
                    self._sending_over(attempt, None, now)
                case SendFailed(attempt=attempt):
                    self._sending_over(attempt, effect, now)
                case Reserve(attempt=attempt):
                    self._decode.request(attempt)
                case Runnable(attempt=attempt, token=token):
                    self._received(attempt, token, now)
                case ReceiveEnded(attempt=attempt):
                    self._receiving_over(effect, now)

    def _sending_over(self, attempt: Attempt, failure: SendFailed | None, now: float) -> None:
        if self._retired.returned(attempt):
            return
        if failure is not None:
            key = self._attempts.place(attempt).key
            self._tell(AttemptFailed(key, failure.kind, failure.text))
        self._attempts.end(attempt, now)
        self._retired.add(self._prefill.remove(attempt).seq)

    def _receiving_over(self, ended: ReceiveEnded, now: float) -> None:
        if self._retired.returned(ended.attempt):
            return
        if ended.kind is not None:
            key = self._attempts.place(ended.attempt).key
            self._tell(AttemptFailed(key, ended.kind, ended.text))
        self._attempts.end(ended.attempt, now)
        seq = self._decode.remove(ended.attempt)
        assert seq is not None
        self._retired.add(seq)

    def _received(self, attempt: Attempt, token: TokenItem, now: float) -> None:
        """All blocks and the first token are in: it joins the batch, which says that token too."""
        seq = self._decode.received(attempt)
        self._decode.join(seq)
        if token.index != seq.num_output_tokens or token.token_id >= self._limits.vocab_size:
            text = f"the peer's first token is {token.token_id} at index {token.index}"
            self._fail(attempt, FailureKind.TRANSFER, text, now)
            return
        drawn = SampledToken(-1, token.token_id, token.logprob, token.top)
        item = self._item(seq, drawn)
        seq.token_ids.append(token.token_id)
        self._tell(TokenBatch((item,)))
        if item.finish is not None:
            self._finish(attempt, now)

    def _hand_over(self, chunk: Chunk, now: float) -> None:
        """A chunk for a peer is computed: its blocks are offered, at the end with the token."""
        prompt, seq, attempt = chunk.prompt, chunk.prompt.seq, chunk.prompt.attempt
        if not chunk.last:
            num_full = seq.num_computed_tokens // self._cache.block_size
            self._absorb(self._sender.offer(attempt, seq.block_table[:num_full], now), now)
            return
        assert prompt.token is not None
        self._prefill.computed(prompt)
        self._give_slot_back(seq)
        if prompt.token.finish is not None:
            self._end(attempt, "its first token was its last", now)
            return
        self._absorb(self._sender.offer(attempt, seq.block_table, now), now)
        self._absorb(self._sender.commit(attempt, prompt.token, now), now)

    # room

    def _grant(self, now: float) -> None:
        """Room for reservations, in their order, behind those that wait for blocks already."""
        while not self._prefill.urgent:
            reservation = self._decode.reserve()
            if reservation is None and self._standing_still:
                reservation = self._decode.reserve_lowest(
                    lambda num_blocks, above: self._retract(
                        self._prefill.make_room(num_blocks, above), now
                    )
                )
            if reservation is None:
                return
            reserved = self._receiver.reserved(
                reservation.attempt, reservation.first_block, reservation.blocks, now
            )
            self._absorb(reserved, now)

    @property
    def _standing_still(self) -> bool:
        """Whether no block will come back unless a prompt that is held for a peer is dropped."""
        frees_blocks = self._decode.frees_blocks or self._prefill.frees_blocks
        return not (frees_blocks or self._retired)

    def _spare(self, prompt: Prompt) -> int | None:
        """What a prompt that starts must leave available; None where it must wait anyhow."""
        match prompt.kind:
            case PromptKind.RECOMPUTE:
                return self._decode.headroom(prompt.seq)
            case PromptKind.LOCAL:
                if self._decode.num_reserving or self._decode.num_free_places == 0:
                    return None
                return self._decode.headroom(prompt.seq)
            case PromptKind.TRANSFER:
                if self._decode.num_reserving and not prompt.begun:
                    return None
                return self._decode.headroom(None)

    def _make_room(self, now: float) -> bool:
        """A block for a running sequence, from a prompt that is held for a peer."""
        dropped = self._prefill.make_room(1)
        self._retract(dropped, now)
        return bool(dropped)

    def _retract(self, dropped: Iterable[Prompt], now: float) -> None:
        """What was offered of these prompts is gone; they will be offered anew."""
        for prompt in dropped:
            self._absorb(self._sender.offer(prompt.attempt, (), now), now)

    def _started(self, prompt: Prompt, now: float) -> None:
        """A prompt has its blocks. The router and the peer hear of that once."""
        seq, attempt = prompt.seq, prompt.attempt
        if prompt.kind is PromptKind.LOCAL:
            self._decode.take_place(seq)
        if prompt.kind is PromptKind.RECOMPUTE or prompt.dropped:
            return
        place = self._attempts.place(attempt)
        self._tell(Started(place.key, seq.num_cached_tokens))
        if prompt.kind is PromptKind.TRANSFER:
            assert place.peer is not None
            self._absorb(self._sender.start(attempt, place.peer, seq.num_tokens, now), now)

    # small things

    def _planned(
        self, seq: Sequence, num_tokens: int, chunk: Chunk | None, new: list[NewSequence]
    ) -> _PlannedRow:
        """A row of the step that is being planned; fills a slot where ``seq`` has none."""
        if seq.slot is None:
            seq.slot = self._slots.pop()
            table = tuple(seq.block_table)
            tokens = tuple(seq.token_ids)
            new.append(NewSequence(seq.slot, tokens, seq.num_prompt_tokens, seq.params, table))
            seq.num_told_blocks = len(table)
        sample = chunk is None or chunk.sample
        new_blocks = tuple(seq.block_table[seq.num_told_blocks :])
        row = Row(seq.slot, seq.num_scheduled_tokens, num_tokens, new_blocks, sample)
        seq.num_told_blocks = len(seq.block_table)
        seq.num_scheduled_tokens += num_tokens
        seq.num_inflight += 1
        seq.num_sampling += sample
        return _PlannedRow(seq, row, chunk)

    def _item(self, seq: Sequence, drawn: SampledToken) -> TokenItem:
        """The next token of ``seq``, which does not have it yet."""
        finish: FinishReason | None = self._rules.reason(seq, drawn.token_id)
        key, index = Key.of(seq.attempt), seq.num_output_tokens
        return TokenItem(key, index, drawn.token_id, finish, drawn.logprob, drawn.top)

    def _release(self, seq: Sequence) -> None:
        self._cache.release(seq)
        self._give_slot_back(seq)

    def _give_slot_back(self, seq: Sequence) -> None:
        if seq.slot is not None:
            self._slots.append(seq.slot)
            seq.slot = None

    def _tell(self, message: ToRouter) -> None:
        self._out.append(Tell(message))

    def _settled(self, now: float) -> list[Effect]:
        """The effects since the last call, after everything that they made possible."""
        self._grant(now)
        idle = not (self._attempts or self._steps or self._retired)
        if self._draining and idle and not self._drained:
            self._drained = True
            self._tell(Bye())
        effects, self._out = self._out, []
        return effects
