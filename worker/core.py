"""A worker without its sockets, threads and tensors: messages and results in, effects out.

Its caller does the effects in order, calls ``plan`` when a step may be launched and
anything has happened since, ``complete`` with each step's result in the order of
launching, and ``tick`` every ``TICK_S`` at the latest. What an attempt goes through is
told in ``lifecycle``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Listing

from ..cache.sequence import Sequence
from ..core.cost import StepCost
from ..core.ids import Attempt, Role, WorkerRef
from ..core.messages import (
    Abort,
    BlockCounts,
    Bye,
    Drain,
    Duty,
    Place,
    Refused,
    ResyncCache,
    RouterBeat,
    SetRole,
    TokenBatch,
    TokenItem,
    ToWorker,
    Welcome,
    WorkerBeat,
)
from ..core.plan import EngineLimits, KvLayout, StepPlan, StepResult
from ..kvtransfer.messages import ToReceiver, ToSender
from ..kvtransfer.receiver import Receiver
from ..kvtransfer.sender import Sender
from ..prefill.pace import chunk_tokens, without_padding
from ..prefill.phase import Chunk
from ..prefill.prompt import Prompt, PromptKind
from .budget import Budget
from .effects import Effect
from .lifecycle import Lifecycle
from .steps import Steps
from .times import StepTimes

_TELL_SLACK_EVERY = 4  # steps of a batch alone
FLIP_LIMIT_S = 10.0  # for what an old role has begun; then the new one goes beside it
TICK_S = 0.25  # how often ``tick`` wants to be called, at the least


class WorkerCore:
    """One worker's decisions. It begins in ``role`` and may be given another of ``budgets``.

    ``cost`` is what its steps were measured to take. ``salt`` keys its block hashes until the
    router says another. ``memory_s`` must outlive the longest lease: so long an attempt that
    is over stays so.
    """

    def __init__(
        self,
        role: Role,
        budgets: Mapping[Role, Budget],
        limits: EngineLimits,
        layout: KvLayout,
        sender: Sender,
        receiver: Receiver,
        *,
        salt: bytes,
        prefix_cache: bool = True,
        memory_s: float = 120.0,
        cost: StepCost | None = None,
    ) -> None:
        self._limits = limits
        self._budgets = {one: budget.within(limits) for one, budget in budgets.items()}
        self._role = role
        self._next_role: tuple[Role, float] | None = None  # and when it was asked for
        self._times = StepTimes(cost)
        self._sender = sender
        self._receiver = receiver
        self._steps = Steps(limits.max_slots)
        self._life = Lifecycle(
            self._budget,
            limits,
            layout,
            sender,
            receiver,
            self._steps.give_slot_back,
            salt=salt,
            prefix_cache=prefix_cache,
            memory_s=memory_s,
        )
        self._waited = 0  # steps of the batch that prompts have waited for by now
        self._slack_told = 0, 0  # for how large a batch, and how many steps ago
        self._drained = False

    # what the worker publishes

    @property
    def max_context(self) -> int:
        """Tokens of prompt and output together that a request may have here."""
        return self._life.max_context

    @property
    def max_batch(self) -> int:
        return self._budget.max_batch

    @property
    def chunk_tokens(self) -> int:
        return self._budget.chunk_tokens

    @property
    def role(self) -> Role:
        return self._role

    @property
    def hung_after_s(self) -> float:
        """Without a result of the steps in flight for so long, something is wrong."""
        return self._times.hung_after_s

    @property
    def _budget(self) -> Budget:
        return self._budgets[self._role]

    @property
    def blocks(self) -> BlockCounts:
        return self._life.cache.counts()

    @property
    def may_run(self) -> bool:
        """Whether ``plan`` might find something to launch."""
        return self._life.prefill.computes or self._life.decode.num_running > 0

    @property
    def drained(self) -> bool:
        """Told to drain, everything finished, Bye said."""
        return self._drained

    def beat(self) -> WorkerBeat:
        """For the router, every half second: an attempt that is not in it is not here."""
        life = self._life
        prefill, decode, beside = self._times.factors
        return WorkerBeat(
            blocks=self.blocks,
            waiting=life.prefill.num_waiting + life.decode.num_reserving,
            running=life.decode.num_running,
            live=life.attempts.live_keys(),
            links=self._sender.links(),
            duty=Duty(self._role, self.chunk_tokens, self.max_batch),
            prefill_factor=prefill,
            decode_factor=decode,
            beside_factor=beside,
        )

    # what comes in

    def router_message(self, message: ToWorker, now: float) -> list[Effect]:
        match message:
            case Place():
                self._life.place(message, now)
            case Abort(key=key):
                self._life.abort(key.attempt, now)
            case RouterBeat(live=live):
                listed = (key.attempt for key in live)
                self._life.end_all("the router has given it up", now, but=listed)
            case Drain():
                self._life.draining = True
            case Welcome(salt=salt):
                self._life.tell_cache(salt)
            case SetRole(role=role):
                self._next_role = (role, now) if role is not self._role else None
            case ResyncCache():
                self._life.tell_cache()
            case Refused():
                pass  # between the router and the socket's owner
        return self._settled(now)

    def receiver_message(
        self, peer: WorkerRef, message: ToReceiver, frames: Listing[memoryview], now: float
    ) -> list[Effect]:
        """From a peer that has dialled in: it sends, this worker receives."""
        self._life.absorb(self._receiver.receive(peer, message, frames, now), now)
        return self._settled(now)

    def sender_message(self, peer: WorkerRef, message: ToSender, now: float) -> list[Effect]:
        """From a peer that this worker has dialled: it receives, this worker sends."""
        self._life.absorb(self._sender.receive(peer, message, now), now)
        return self._settled(now)

    def sent(self, attempt: Attempt, first_block: int, now: float) -> list[Effect]:
        """The blocks of that ``SendBlocks`` are read no more, whether they left or not."""
        self._life.absorb(self._sender.sent(attempt, first_block, now), now)
        return self._settled(now)

    def written(self, attempt: Attempt, first_block: int, ok: bool, now: float) -> list[Effect]:
        """That ``Write`` is done; not ``ok`` where a checksum did not match."""
        self._life.absorb(self._receiver.written(attempt, first_block, ok, now), now)
        return self._settled(now)

    def peer_lost(self, peer: WorkerRef, text: str, now: float) -> list[Effect]:
        """The other worker is dead, or its socket was given up."""
        self._life.absorb(self._sender.peer_lost(peer, text, now), now)
        self._life.absorb(self._receiver.peer_lost(peer, text, now), now)
        return self._settled(now)

    def router_lost(self, now: float) -> list[Effect]:
        """Nobody is left who wants an answer: everything ends."""
        self._life.end_all("the router is gone", now)
        return self._settled(now)

    def tick(self, now: float) -> list[Effect]:
        """Time has passed: leases, resends, beats between peers, tombstones."""
        self._life.absorb(self._sender.tick(now), now)
        self._life.absorb(self._receiver.tick(now), now)
        self._life.fail_expired(now)
        self._life.attempts.forget(now)
        self._life.tell_cache_news()
        return self._settled(now)

    # steps

    def plan(self, now: float) -> tuple[StepPlan | None, list[Effect]]:
        """The next step to launch; None where there is nothing to run or enough in flight.

        Running sequences come first, then reservations, then prompts: whoever is further
        on gets memory before those behind.
        """
        life, steps = self._life, self._steps
        if len(steps) >= self._limits.max_inflight:
            return None, []
        running, preempted = life.decode.schedule(lambda: life.drop_for_growth(now))
        for seq in preempted:
            life.prefill.add(Prompt(seq, PromptKind.RECOMPUTE))
        kv_tokens = 0
        for seq in running:
            steps.add(seq)
            kv_tokens += seq.num_scheduled_tokens
        life.grant(now)
        self._demote(now)
        chunks, dropped = life.prefill.schedule(
            self._chunk_tokens(running, kv_tokens, now),
            steps.num_free_slots,
            life.spare,
            lambda prompt: life.started(prompt, now),
        )
        life.retract(dropped, now)
        waits = bool(running) and not chunks and life.prefill.computes
        self._waited = self._waited + 1 if waits else 0
        chunk_ms = 0.0
        for chunk in chunks:
            has_slot = steps.add(chunk.prompt.seq, chunk.num_tokens, chunk)
            assert has_slot, chunk
            chunk_ms += self._times.chunk_ms(chunk.num_tokens, chunk.start)
        plan = steps.launch()
        if plan is not None:
            self._times.launched(len(running), kv_tokens, chunk_ms, now)
        return plan, self._settled(now)

    def _chunk_tokens(self, running: Listing[Sequence], kv_tokens: int, now: float) -> int:
        """Of prompts in the next step: what the budget allows, and the batch beside it."""
        most = min(self._budget.chunk_tokens, self._limits.max_step_tokens - len(running))
        cost, first = self._times.cost, self._life.prefill.first
        if cost is None or first is None or most <= 0:
            return most
        slack_s = self._slack_s(running, now)
        if slack_s == math.inf:
            return most
        context = first.seq.num_scheduled_tokens
        batch = len(running)
        tokens = chunk_tokens(cost, most, batch, kv_tokens, slack_s, context, self._waited)
        if not batch:
            return tokens
        return min(most, without_padding(tokens, batch, self._limits.step_sizes))

    def _slack_s(self, running: Collection[Sequence], now: float) -> float:
        """What the next step may take: those in flight end first."""
        return self._life.paces.slack_s(running, now) - self._times.left_s(now)

    def _slack_to_tell(self, has_chunks: bool, now: float) -> float | None:
        """In ms. A batch that runs on alone gets ahead as the router expects."""
        running = self._life.decode.running
        size, age = self._slack_told
        if size == len(running) and age < _TELL_SLACK_EVERY and not has_chunks:
            self._slack_told = size, age + 1
            return None
        self._slack_told = len(running), 1
        return self._slack_s(running, now) * 1e3

    def _demote(self, now: float) -> None:
        cost = self._times.cost
        if cost is not None:

            def seconds(prompt: Prompt) -> float:
                seq = prompt.seq
                return cost.prefill.work_ms(seq.num_missing_tokens, seq.num_scheduled_tokens) / 1e3

            self._life.prefill.demote(now, seconds)

    def complete(self, result: StepResult, now: float, since: float | None = None) -> list[Effect]:
        """The oldest launched step is done, ``since`` that time or later where it was not waited
        for. Its tokens are told before anything else is."""
        life = self._life
        self._times.completed(now, since)
        tokens = iter(result.tokens)
        items: list[TokenItem] = []
        for_peers: list[Chunk] = []
        has_chunks = False
        for seq, row, chunk in self._steps.read():
            has_chunks = has_chunks or chunk is not None
            drawn = next(tokens) if row.sample else None
            seq.num_inflight -= 1
            if seq in life.retired:
                life.retired.row_read(seq)
                continue
            seq.num_computed_tokens = row.start + row.num_tokens
            life.cache.store(seq)
            if chunk is not None and chunk.prompt.kind is PromptKind.TRANSFER:
                for_peers.append(chunk)
                if chunk.last:
                    self._steps.give_slot_back(seq)
            if drawn is None:
                continue
            assert drawn.slot == row.slot, (drawn, row)
            seq.num_sampling -= 1
            if chunk is None:
                items.append(life.drawn(seq, drawn, now))
            elif chunk.prompt.kind is PromptKind.TRANSFER:
                items.append(life.drawn_for_peer(chunk.prompt, drawn))
            else:
                life.prefill.computed(chunk.prompt)
                life.decode.join(seq)
                items.append(life.drawn(seq, drawn, now))
        if items:
            life.tell(TokenBatch(tuple(items), self._slack_to_tell(has_chunks, now)))
        for chunk in for_peers:
            life.chunk_computed(chunk, now)
        return self._settled(now)

    def check(self) -> None:
        """Asserts that every block and every slot is accounted for."""
        self._life.check()
        slots = [seq.slot for seq in self._life.sequences() if seq.slot is not None]
        assert sorted([*slots, *self._steps.free_slots]) == list(range(self._limits.max_slots))

    def _settled(self, now: float) -> list[Effect]:
        """The effects since the last call, with what the latest event made possible."""
        life = self._life
        self._flip(now)
        life.grant(now)
        idle = not (life.attempts or len(self._steps) or life.retired)
        if life.draining and idle and not self._drained:
            self._drained = True
            life.tell(Bye())
        return life.take_effects()

    def _flip(self, now: float) -> None:
        """Takes on the role that was asked for, once what it has less room for is done."""
        if self._next_role is None:
            return
        role, asked_at = self._next_role
        life = self._life
        busy = (role is Role.DECODE and life.prefill.computes) or (
            role is Role.PREFILL and not life.decode.idle
        )
        if busy and now - asked_at < FLIP_LIMIT_S:
            return
        self._role, self._next_role = role, None
        life.decode.resize(self.max_batch)
