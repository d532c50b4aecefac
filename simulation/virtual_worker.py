"""A worker in virtual time: the real schedulers and block accounts, steps that only take time.

    prompt    WAITING -> COMPUTING -> (joins the batch here | HOLDING -> delivered to a peer)
    answer    RESERVING -> RECEIVING -> RUNNING -> done

A step with chunks is an event. A run of steps that only decode is one event too, to the
step at whose end somebody is done, and cut short where something happens before: in between
the batch is the same, and its time is a sum. Blocks that a run has grown are booked when an
account is looked at next; where the pool gets short, the decode scheduler is asked step by
step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..cache.kvcache import KvCache
from ..cache.retired import RetiredSequences
from ..cache.sequence import Sequence
from ..core.cost import CalibratedCost
from ..core.ids import Attempt, Role, WorkerRef
from ..core.lengths import AnswerLengths
from ..core.messages import Key, TokenItem
from ..core.params import SamplingParams
from ..decode.finish import FinishRules
from ..decode.phase import DecodePhase
from ..prefill.pace import chunk_tokens
from ..prefill.phase import Chunk, PrefillPhase
from ..prefill.prompt import Prompt, PromptKind, PromptState
from .served import Served
from .step_run import StepRun
from .virtual_batch import Stream, VirtualBatch
from .worker_spec import WorkerSpec

_MAX_CONTEXT = 1 << 24
_PROMPT_SLOTS = 64
_PUBLISH_S = 0.5  # a worker tells the router its corrected costs so often, as its beats do


class Listener(Protocol):
    """What a worker says to the router."""

    def started(self, served: Served, now: float) -> None: ...
    def first_token(self, served: Served, now: float) -> None: ...
    def grown(self, served: Served, count: int) -> None: ...
    def ended(self, served: Served, worker: VirtualWorker, now: float) -> None: ...
    def measured(self, worker: VirtualWorker) -> None: ...
    def slack(self, worker: VirtualWorker) -> None: ...


class Timeline(Protocol):
    def at(self, time: float, call: Callable[[float], None]) -> None: ...


@dataclass(slots=True)
class _Transfer:
    served: Served
    prompt: Prompt
    receiver: VirtualWorker
    last_chunk: int = 0
    delivering: bool = False


@dataclass(slots=True)
class Usage:
    """Seconds with a chunk in the step, and seconds with only decode; ``recomputed`` streams."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    recomputed: int = 0


@dataclass(eq=False)
class VirtualWorker:
    ref: WorkerRef
    role: Role
    spec: WorkerSpec
    timeline: Timeline
    router: Listener
    rng: random.Random
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        spec = self.spec
        self.cache = KvCache(spec.num_blocks, spec.block_size, b"", spec.prefix_cache)
        self._retired = RetiredSequences(self.cache.release)
        self.prefill = PrefillPhase(self.cache, self._retired)
        rules = FinishRules(frozenset(), _MAX_CONTEXT)
        self.decode = DecodePhase(self.cache, self._retired, rules, spec.max_batch)
        self.costs = CalibratedCost(spec.cost)
        self.cost = spec.cost  # as corrected when it was last looked at
        self._truth = (spec.truth or spec.cost).scaled(*(spec.slowdown,) * 3)
        self._lengths = AnswerLengths()
        self._served: dict[Attempt, Served] = {}
        self._transfers: dict[Attempt, _Transfer] = {}
        self._senders: dict[Attempt, VirtualWorker] = {}  # of what is to decode here
        self._expected: dict[Attempt, Sequence] = {}
        self._arrived: list[Attempt] = []
        self._batch = VirtualBatch(self.cache, spec.paced, self.router.grown)
        self._run: StepRun | None = None
        self._count = 0
        self._waited = 0  # steps of the batch that prompts have waited for by now
        self._published = 0.0
        self.slack_ms = math.inf  # as in ``WorkerView``
        self.slack_at = 0.0

    # what the router says

    def take(self, served: Served, receiver: VirtualWorker | None, now: float) -> None:
        """To prefill; the answer is written here too where there is no ``receiver``."""
        seq = self._sequence(served)
        kind = PromptKind.LOCAL if receiver is None else PromptKind.TRANSFER
        arrival = served.arrival
        prompt = Prompt(seq, kind, deadline=arrival.time + arrival.ttft_ms / 1e3)
        self._served[served.attempt] = served
        if receiver is not None:
            self._transfers[served.attempt] = _Transfer(served, prompt, receiver)
        self.prefill.add(prompt)
        self._wake(now)

    def expect(self, served: Served, sender: VirtualWorker) -> None:
        """To decode what ``sender`` prefills."""
        seq = self._sequence(served)
        self._served[served.attempt] = served
        self._senders[served.attempt] = sender
        self._expected[served.attempt] = seq
        self.decode.expect(seq)

    def _sequence(self, served: Served) -> Sequence:
        arrival = served.arrival
        seq = Sequence(
            Key(served.request_id, 1),
            _ANY_LENGTH,
            self._count,
            arrival.prompt,
            [0] * arrival.prompt,
            block_hashes=list(arrival.block_hashes),
        )
        self._count += 1
        return seq

    # what a peer says

    def requested(self, attempt: Attempt, now: float) -> None:
        """The sender has begun the prompt."""
        self.decode.request(attempt)
        self._grant(now)

    def granted(self, attempt: Attempt, now: float) -> None:
        """The receiver has room."""
        self.prefill.grant(attempt, now)
        self._deliver(attempt, now)

    def withdrawn(self, attempt: Attempt, now: float) -> None:
        """Its first token was its last."""
        self._served.pop(attempt)
        self._senders.pop(attempt)
        self._expected.pop(attempt)
        seq = self.decode.remove(attempt)
        assert seq is not None
        self._retired.add(seq)
        self._grant(now)

    def _deliver(self, attempt: Attempt, now: float) -> None:
        """Where it is both computed and granted, its last blocks travel now."""
        transfer = self._transfers[attempt]
        prompt = transfer.prompt
        if transfer.delivering or not prompt.granted or prompt.state is not PromptState.HOLDING:
            return
        transfer.delivering = True
        spec = self.spec
        time = now + spec.transfer_s + spec.transfer_s_per_token * transfer.last_chunk

        def arrive(now: float) -> None:
            del self._transfers[attempt], self._served[attempt]
            self._retired.add(self.prefill.remove(attempt).seq)
            transfer.receiver._received(attempt, now)
            self._wake(now)

        self.timeline.at(time, arrive)

    def _received(self, attempt: Attempt, now: float) -> None:
        del self._senders[attempt]
        self._arrived.append(attempt)
        self._wake(now)

    # steps

    def _wake(self, now: float) -> None:
        """Something has changed: an idle worker begins, a run of decode steps is cut short at
        the end of the step that is on."""
        run = self._run
        if run is None:
            self._plan(now)
            return
        if run.cut_short(now):
            self._schedule_end(run)

    def _schedule_end(self, run: StepRun) -> None:
        version = run.version

        def end(now: float) -> None:
            if self._run is run and run.version == version:
                self._end(run, now)

        self.timeline.at(run.end, end)

    def _plan(self, now: float) -> None:
        assert self._run is None
        for attempt in self._arrived:
            seq = self.decode.received(self._expected.pop(attempt).attempt)
            self._join(self._served[attempt], seq, 1)
        self._arrived.clear()
        skipped: tuple[Stream, ...] = ()
        short = self._short(2 * len(self._batch))
        if short and len(self._batch):
            self._batch.settle()
            short = self.cache.num_available < len(self._batch)
            if short:
                skipped = self._step_by_step()
        self._grant(now)
        if not self.prefill.computes:
            self._waited = 0
        chunks = self._chunks(now) if self.prefill.computes else []
        batch = len(self._batch) - len(skipped)
        if not chunks and not batch:
            return
        kv = self._batch.kv_tokens - sum(stream.seq.num_tokens for stream in skipped)
        cost, truth = self.spec.cost, self._truth
        work = sum(cost.prefill.work_ms(chunk.num_tokens, chunk.start) for chunk in chunks)
        takes = sum(truth.prefill.work_ms(chunk.num_tokens, chunk.start) for chunk in chunks)
        seconds = truth.ms(batch, kv, takes) / 1e3
        steps = 1
        if not chunks and not short and not self._waited:
            steps = self._batch.steps_to_end
            room = (self.cache.num_available - self._batch.most_unbooked) // max(1, batch) - 1
            steps = max(1, min(steps, room * self.spec.block_size))
        slope = truth.decode.per_kv_token_ms * batch / 1e3
        if self.spec.jitter:
            deviation = self.spec.jitter / math.sqrt(steps)
            factor = max(0.2, self.rng.gauss(1.0, deviation))
            seconds, slope = seconds * factor, slope * factor
        self._run = StepRun(now, steps, seconds, slope, chunks, work, skipped)
        self._schedule_end(self._run)
        self.slack_at = self._run.after(1)
        self.slack_ms = (self._batch.earliest_due(2) - self.slack_at) * 1e3
        self.router.slack(self)

    def _chunks(self, now: float) -> list[Chunk]:
        spec, cost = self.spec, self.cost
        if spec.demote:
            self.prefill.demote(now, self._seconds_left)
        most = spec.chunk_tokens
        if not spec.paced:
            most = max(1, most - len(self._batch))
        elif len(self._batch):
            first = self.prefill.first
            assert first is not None
            slack_s = self._batch.earliest_due() - now
            context = first.seq.num_scheduled_tokens
            batch, kv = len(self._batch), self._batch.kv_tokens
            most = chunk_tokens(cost, most, batch, kv, slack_s, context, self._waited)
        chunks, _ = self.prefill.schedule(
            most, _PROMPT_SLOTS, self._spare, lambda prompt: self._started(prompt, now)
        )
        for chunk in chunks:
            chunk.prompt.seq.num_scheduled_tokens += chunk.num_tokens
        self._waited = 0 if chunks or most else self._waited + 1
        return chunks

    def _seconds_left(self, prompt: Prompt) -> float:
        """The least time that a prompt still takes, were it alone."""
        left, start = prompt.seq.num_missing_tokens, prompt.seq.num_scheduled_tokens
        return self.cost.prefill.work_ms(left, start) / 1e3

    def _started(self, prompt: Prompt, now: float) -> None:
        if prompt.kind is PromptKind.LOCAL:
            self.decode.take_place(prompt.seq)
        if prompt.kind is PromptKind.RECOMPUTE or prompt.dropped:
            return
        served = self._served[prompt.attempt]
        served.num_cached_tokens = prompt.seq.num_cached_tokens
        self.router.started(served, now)
        if prompt.kind is PromptKind.TRANSFER:
            self._transfers[prompt.attempt].receiver.requested(prompt.attempt, now)

    def _end(self, run: StepRun, now: float) -> None:
        self._run = None
        self._observe(run, now)
        for stream in self._batch.advance(run.steps, run.skipped):
            self._finish(stream, now)
        for chunk in run.chunks:
            self._computed(chunk, now)
        self._batch.settle_now_and_then()
        self._plan(now)

    def _observe(self, run: StepRun, now: float) -> None:
        taken = (now - run.start) * 1e3
        batch = len(self._batch) - len(run.skipped)
        kv = self._batch.kv_tokens + batch * (run.steps - 1) / 2
        if run.chunks:
            self.usage.prefill_s += taken / 1e3
        else:
            self.usage.decode_s += taken / 1e3
        step_ms = taken / run.steps
        self.costs = self.costs.observed(batch, int(kv), run.work_ms, step_ms, run.steps)
        if now - self._published >= _PUBLISH_S:
            self._published = now
            self.cost = self.costs.cost
            self.router.measured(self)

    def _computed(self, chunk: Chunk, now: float) -> None:
        prompt, seq = chunk.prompt, chunk.prompt.seq
        seq.num_computed_tokens = chunk.start + chunk.num_tokens
        self.cache.store(seq)
        if not chunk.last:
            return
        attempt = prompt.attempt
        served = self._served[attempt]
        if served.first is None:
            served.first = now
            self.router.first_token(served, now)
            if served.arrival.output == 1:
                self._ended_by_first(prompt, served, now)
                return
        self.prefill.computed(prompt)
        if prompt.kind is PromptKind.TRANSFER:
            prompt.token = TokenItem(seq.key, 0, 0)
            transfer = self._transfers[attempt]
            transfer.last_chunk = chunk.num_tokens if prompt.granted else seq.num_tokens
            self._deliver(attempt, now)
        elif prompt.kind is PromptKind.LOCAL:
            self._join(served, seq, 1)
        else:
            self.usage.recomputed += 1
            self._join(served, seq, seq.num_output_tokens + 1)

    def _ended_by_first(self, prompt: Prompt, served: Served, now: float) -> None:
        served.last = now
        attempt = prompt.attempt
        self._retired.add(self.prefill.remove(attempt).seq)
        self.decode.remove(attempt)
        del self._served[attempt]
        self._lengths.ended(1)
        transfer = self._transfers.pop(attempt, None)
        if transfer is not None:
            transfer.receiver.withdrawn(attempt, now)
        self.router.ended(served, self, now)

    # the batch

    def _join(self, served: Served, seq: Sequence, num_output: int) -> None:
        """``num_output`` tokens of the answer are there, with the one just drawn."""
        seq.token_ids.append(0)
        assert seq.num_output_tokens == num_output
        self.decode.join(seq)
        self._batch.join(served, seq, self._lengths.short)

    def _finish(self, stream: Stream, now: float) -> None:
        seq, served = stream.seq, stream.served
        self._batch.remove(seq.attempt)
        del self._served[seq.attempt]
        served.last = now
        self._lengths.ended(served.arrival.output)
        self.cache.store(seq)
        self.decode.remove(seq.attempt)
        self._retired.add(seq)
        self.router.ended(served, self, now)

    def _short(self, num_blocks: int) -> bool:
        """Whether fewer may be available, as far as can be told without booking."""
        return self.cache.num_available - self._batch.most_unbooked < num_blocks

    def _step_by_step(self) -> tuple[Stream, ...]:
        """The decode scheduler says who runs: returns who sits this step out."""
        rows, preempted = self.decode.schedule(lambda: bool(self.prefill.make_room(1)))
        for seq in preempted:
            self._batch.remove(seq.attempt)
            self.prefill.add(Prompt(seq, PromptKind.RECOMPUTE))
        running = {seq.attempt for seq in rows}
        return tuple(stream for stream in self._batch if stream.seq.attempt not in running)

    # room

    def _grant(self, now: float) -> None:
        while self.decode.num_reserving and not self.prefill.urgent:
            if self._run is None or not self._run.skipped:
                self._settle_if_short()
            reservation = self.decode.reserve()
            if reservation is None and self._standing_still:
                reservation = self.decode.reserve_lowest(
                    lambda num_blocks, above: self._make_room(num_blocks, above)
                )
            if reservation is None:
                return
            self._senders[reservation.attempt].granted(reservation.attempt, now)

    def _make_room(self, num_blocks: int, above: str) -> None:
        self.prefill.make_room(num_blocks, above)

    @property
    def _standing_still(self) -> bool:
        return not (self.decode.frees_blocks or self.prefill.frees_blocks or self._retired)

    def _settle_if_short(self) -> None:
        """Books what has grown, where a claim might see more blocks than there are. In the
        middle of a run that is what its start has left: the rest is still to come."""
        if self._short(self.spec.num_blocks // 8):
            self._batch.settle()

    def _spare(self, prompt: Prompt) -> int | None:
        self._settle_if_short()
        match prompt.kind:
            case PromptKind.RECOMPUTE:
                return self.decode.spare(prompt.seq)
            case PromptKind.LOCAL:
                if self.decode.num_reserving or self.decode.num_free_places == 0:
                    return None
                return self.decode.spare(prompt.seq)
            case PromptKind.TRANSFER:
                if self.decode.num_reserving and not prompt.begun:
                    return None
                return self.decode.spare(prompt.seq, joins=False)

    def check(self) -> None:
        """Asserts that every block is accounted for."""
        self._batch.settle()
        held = {*self._retired, *self.decode, *(prompt.seq for prompt in self.prefill)}
        self.cache.check(held)


_ANY_LENGTH = SamplingParams(max_tokens=1 << 20)  # nobody knows how long an answer gets
