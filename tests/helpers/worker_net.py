"""Worker cores joined by queues in memory, with a simulated engine each and a tiny router.

Whatever two threads or two machines could do in either order is a choice here, drawn from
``random.Random``: what is delivered next, which step completes, when the I/O thread reads
a block. Each channel keeps its own order, as a socket does. After every event the core
checks its accounts; a wrong block shows as a wrong token.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from pdserve.core.ids import Attempt, Medium, Role, Task, WorkerRef
from pdserve.core.messages import (
    Abort,
    AttemptFailed,
    Bye,
    FailureKind,
    Key,
    PeerAddress,
    Place,
    RouterBeat,
    SetRole,
    Started,
    TokenBatch,
    ToRouter,
    ToWorker,
    TransferDone,
)
from pdserve.core.params import SamplingParams
from pdserve.core.plan import PoolExport
from pdserve.kvtransfer.effects import Pull, Send, SendBlocks, Write
from pdserve.kvtransfer.handshake import Handshake
from pdserve.kvtransfer.messages import Chunk, Connect
from pdserve.kvtransfer.receiver import Receiver
from pdserve.kvtransfer.sender import Sender
from pdserve.kvtransfer.settings import TransferSettings
from pdserve.simulation.engine import SimulatedEngine, SimulatedModel, SimulatedStep
from pdserve.worker.budget import Budget
from pdserve.worker.core import WorkerCore
from pdserve.worker.effects import Effect, Tell

Action = Callable[[], object]
MODEL = SimulatedModel(vocab_size=64, eos_token_ids=(0, 1), eos_probability=0.05, token_bytes=16)


@dataclass(frozen=True, slots=True)
class Shape:
    """One worker's size."""

    num_blocks: int = 16
    block_size: int = 4
    max_context: int = 48
    max_batch: int = 4
    max_slots: int = 8
    chunk_tokens: int = 6
    growth_tokens: int = 0
    max_inflight: int = 1
    prefix_cache: bool = True
    by_reference: bool = False


class Worker:
    """A core, its engine, and the queues of its I/O thread."""

    def __init__(
        self,
        name: str,
        shape: Shape,
        model: SimulatedModel = MODEL,
        epoch: int = 1,
        *,
        decode_chunk: int | None = None,  # as a decode worker; the shape's else
    ) -> None:
        self.name = name
        self.shape = shape
        self.engine = SimulatedEngine(
            model,
            num_blocks=shape.num_blocks,
            block_size=shape.block_size,
            max_slots=shape.max_slots,
            max_context=shape.max_context,
            max_step_tokens=shape.chunk_tokens + shape.max_batch,
            max_inflight=shape.max_inflight,
        )
        layout = self.engine.kv.layout
        self.model = model
        self.ref = WorkerRef(name, epoch)
        self.address = PeerAddress(name, epoch, f"inproc://{name}", f"token of {name}")
        media = (Medium.SHM, Medium.INPROC) if shape.by_reference else (Medium.INPROC,)
        exports = (PoolExport(Medium.SHM, "", bytes(16), layout.num_blocks),)
        token = self.address.token
        self.handshake = Handshake(self.ref, token, "a model", layout, media, exports)
        settings = TransferSettings(
            shape.block_size,
            layout.block_bytes,
            window_bytes=6 * layout.block_bytes,
            chunk_bytes=2 * layout.block_bytes,
            offer_window_bytes=8 * layout.block_bytes,
            offer_bytes=3 * layout.block_bytes,
        )
        budget = Budget(shape.chunk_tokens, shape.max_batch, 4, shape.growth_tokens)
        self.core = WorkerCore(
            Role.MIXED,
            dict.fromkeys(Role, budget)
            | {
                Role.DECODE: replace(
                    budget, chunk_tokens=decode_chunk or max(1, shape.chunk_tokens // 2)
                )
            },
            self.engine.limits,
            layout,
            Sender(settings, self.handshake, self.engine.kv.generations),
            Receiver(settings),
            salt=b"a deployment",
            prefix_cache=shape.prefix_cache,
        )
        self.told: list[ToRouter] = []
        self.steps: deque[SimulatedStep] = deque()
        self.plan_due = True

    def tokens(self) -> list[int]:
        """All token ids told to the router, in order."""
        batches = [message for message in self.told if isinstance(message, TokenBatch)]
        return [item.token_id for batch in batches for item in batch.items]

    def told_of(self, kind: type) -> list[ToRouter]:
        return [message for message in self.told if isinstance(message, kind)]


def run_alone(worker: Worker, effects: Iterable[Effect], max_steps: int = 10_000) -> None:
    """Runs a worker without peers until it has nothing to do."""

    def take(effects: Iterable[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, Tell), effect
            worker.told.append(effect.message)

    take(effects)
    for _ in range(max_steps):
        plan, effects = worker.core.plan(0.0)
        take(effects)
        worker.core.check()
        if plan is not None:
            worker.steps.append(worker.engine.launch(plan))
        elif worker.steps:
            take(worker.core.complete(worker.steps.popleft().wait(), 0.0))
        else:
            return
        worker.core.check()
    raise AssertionError("it never comes to rest")


@dataclass(slots=True)
class Request:
    """A client's request, and what the router knows of it."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    expected: list[int]
    sender: str  # the worker that reads the prompt
    receiver: str  # the one that writes the answer; the same for a whole task
    output: dict[int, int] = field(default_factory=dict)
    number: int = 0
    done: bool = False
    num_replays: int = 0

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.request_id, self.number)

    @property
    def workers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.sender, self.receiver)))

    @property
    def text(self) -> list[int]:
        return [self.output[index] for index in range(len(self.output))]


class Net:
    """Workers, the router between them, and one loop that picks what happens next."""

    def __init__(self, workers: Iterable[Worker], rng: random.Random) -> None:
        self.workers = {worker.name: worker for worker in workers}
        self.rng = rng
        self.now = 0.0
        self.next_tick = 0.1
        self.requests: dict[str, Request] = {}
        self.failures: Counter[FailureKind] = Counter()
        self.lossy = 0.0  # the chance of a message between workers to vanish
        self.spies: list[Callable[[object], None]] = []  # see each message between workers
        # after how many seconds each copy of a message arrives; it may come twice, or never
        self.arrivals: Callable[[object], tuple[float, ...]] = lambda message: (0.0,)
        self._late: list[tuple[float, tuple[str, ...], Action]] = []
        self.damaging = 0.0  # the chance of a chunk to come in damaged
        self._channels: dict[tuple[str, ...], deque[Action]] = {}

    # the router

    def submit(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self._place(request)

    def abort(self, request: Request) -> None:
        """The client has hung up."""
        request.done = True
        for name in request.workers:
            self._control(name, Abort(Key.of(request.attempt)))

    def _place(self, request: Request) -> None:
        key = Key.of(request.attempt)
        output = tuple(request.text)
        if request.sender == request.receiver:
            place = Place(key, Task.WHOLE, request.prompt, output, request.params)
            self._control(request.sender, place)
            return
        for name, peer, task in (
            (request.sender, request.receiver, Task.PREFILL),
            (request.receiver, request.sender, Task.DECODE),
        ):
            address = self.workers[peer].address
            self._control(name, Place(key, task, request.prompt, output, request.params, address))

    def _on_told(self, name: str, message: ToRouter) -> None:
        self.workers[name].told.append(message)
        match message:
            case TokenBatch(items=items):
                for item in items:
                    self._token(item.key, item.index, item.token_id, item.finish is not None)
            case AttemptFailed(key=key, kind=kind):
                self.failures[kind] += 1
                request = self.requests[key.request_id]
                if key.number == request.number and not request.done:
                    self._replay(request)
            case Started() | TransferDone() | Bye():
                pass
            case _:
                raise AssertionError(message)

    def _token(self, key: Key, index: int, token_id: int, finished: bool) -> None:
        request = self.requests[key.request_id]
        assert token_id == request.expected[index], (key, index)
        if request.done or key.number != request.number:
            return
        request.output[index] = token_id
        assert sorted(request.output) == list(range(len(request.output)))
        if finished:
            request.done = True
            assert request.text == request.expected

    def _replay(self, request: Request) -> None:
        for name in request.workers:
            self._control(name, Abort(Key.of(request.attempt)))
        request.num_replays += 1
        assert request.num_replays < 50, "it makes no progress"
        request.number += 1
        self._place(request)

    def restart(self, name: str) -> None:
        """A worker dies with all it knows; another life of it takes its place."""
        old = self.workers[name]
        self.workers[name] = Worker(name, old.shape, old.model, old.ref.epoch + 1)
        for channel, queue in self._channels.items():
            if name in channel:
                queue.clear()
        self._late = [late for late in self._late if name not in late[1]]
        for worker in self.workers.values():
            if worker.name != name:
                self.do(worker, worker.core.peer_lost(old.ref, "it died", self.now))
        for request in self.requests.values():
            if name in request.workers and not request.done:
                self._replay(request)

    def router_restarts(self) -> None:
        """All workers hear that the router is gone; the next one knows no request."""
        for channel, queue in self._channels.items():
            if "router" in channel:
                queue.clear()
        for request in self.requests.values():
            request.done = True
        for worker in self.workers.values():
            self.do(worker, worker.core.router_lost(self.now))

    def beat(self) -> None:
        """The router's half-second: it lists what it believes each worker has."""
        for name in self.workers:
            live = tuple(
                Key.of(request.attempt)
                for request in self.requests.values()
                if name in request.workers and not request.done
            )
            self._control(name, RouterBeat(live))

    def give_role(self, name: str, role: Role) -> None:
        self._control(name, SetRole(role))

    def _control(self, name: str, message: ToWorker) -> None:
        worker = self.workers[name]
        self._put(
            ("router", name),
            lambda: self.do(worker, worker.core.router_message(message, self.now)),
        )

    # the rim

    def _put(self, channel: tuple[str, ...], action: Action) -> None:
        self._channels.setdefault(channel, deque()).append(action)

    def do(self, worker: Worker, effects: Iterable[Effect]) -> None:
        """Hands the effects to the queues they belong to, in order."""
        worker.plan_due = True
        worker.core.check()
        for effect in effects:
            match effect:
                case Tell(message=message):
                    self._tell(worker, message)
                case Send() | SendBlocks() | Write() | Pull():
                    self._io(worker, effect)

    def _tell(self, worker: Worker, message: ToRouter) -> None:
        self._put((worker.name, "router"), lambda: self._on_told(worker.name, message))

    def _io(self, worker: Worker, effect: Send | SendBlocks | Write | Pull) -> None:
        self._put((worker.name, "io"), lambda: self._io_now(worker, effect))

    def _io_now(self, worker: Worker, effect: Send | SendBlocks | Write | Pull) -> None:
        kv, core = worker.engine.kv, worker.core
        match effect:
            case Send(peer=peer, message=message):
                self._transmit(worker, peer, message, ())
            case SendBlocks(peer=peer, message=message, blocks=blocks, tail_tokens=tail):
                if tail:
                    kv.zero_tail(blocks[-1], tail)
                frames: tuple[memoryview, ...] = ()
                if isinstance(message, Chunk):
                    frames = tuple(memoryview(bytes(view)) for view in kv.read(blocks))
                self._transmit(worker, peer, message, frames)
                attempt, first = effect.attempt, message.first_block
                self._put(
                    (worker.name, "sent"),
                    lambda: self.do(worker, core.sent(attempt, first, self.now)),
                )
            case Write(attempt=attempt, first_block=first, blocks=blocks, frames=frames):
                kv.write(blocks, frames)
                ok = self.rng.random() >= self.damaging
                self._put(
                    (worker.name, "written"),
                    lambda: self.do(worker, core.written(attempt, first, ok, self.now)),
                )
            case Pull():
                self._put((worker.name, "pulls"), lambda: self._pull(worker, effect))

    def _pull(self, worker: Worker, effect: Pull) -> None:
        """Copies on a thread of its own; the result may come much later than its reading."""
        other = self.workers[effect.peer.worker_id]
        frames = [bytes(view) for view in other.engine.kv.read(effect.theirs)]
        worker.engine.kv.write(effect.blocks, [memoryview(frame) for frame in frames])

        def confirm() -> None:
            ok = other.ref == effect.peer and self.rng.random() >= self.damaging
            ok = ok and other.engine.kv.generations.are(effect.theirs, effect.generations)
            self.do(worker, worker.core.written(effect.attempt, effect.first_block, ok, self.now))

        self._put((worker.name, "pulled"), confirm)

    def _transmit(
        self,
        worker: Worker,
        peer: PeerAddress | WorkerRef,
        message: object,
        frames: tuple[memoryview, ...],
    ) -> None:
        for spy in self.spies:
            spy(message)
        if self.rng.random() < self.lossy:
            return
        other = self.workers[peer.worker_id]
        if other.ref.epoch != peer.epoch:
            return

        def at_sender() -> None:
            self.do(other, other.core.sender_message(worker.ref, message, self.now))  # type: ignore[arg-type]

        def at_receiver() -> None:
            self._at_receiver(other, worker.ref, message, frames)

        up = isinstance(peer, PeerAddress)
        channel = (worker.name, "up" if up else "down", other.name)
        arrive: Action = at_receiver if up else at_sender
        for delay in self.arrivals(message):
            if delay:
                self._late.append((self.now + delay, channel, arrive))
            else:
                self._put(channel, arrive)

    def _at_receiver(
        self, worker: Worker, peer: WorkerRef, message: object, frames: tuple[memoryview, ...]
    ) -> None:
        if isinstance(message, Connect):
            answer = worker.handshake.answer(message, lambda _: None)
            self._io(worker, Send(peer, answer))
            return
        self.do(worker, worker.core.receiver_message(peer, message, frames, self.now))  # type: ignore[arg-type]

    # the loop

    def deliver_all(self) -> None:
        """Empties all queues: no steps, no time."""
        while queues := [queue for queue in self._channels.values() if queue]:
            self.rng.choice(queues).popleft()()

    def hear(self, name: str) -> None:
        """The router gets what a worker has told it so far."""
        queue = self._channels.get((name, "router"), deque())
        while queue:
            queue.popleft()()

    def plan(self, name: str) -> bool:
        """Has a worker launch a step, if it has one."""
        worker = self.workers[name]
        plan, effects = worker.core.plan(self.now)
        if plan is not None:
            worker.steps.append(worker.engine.launch(plan))
        self.do(worker, effects)
        worker.plan_due = plan is not None
        return worker.plan_due

    def complete(self, name: str) -> None:
        """Has a worker read its oldest step."""
        worker = self.workers[name]
        self.do(worker, worker.core.complete(worker.steps.popleft().wait(), self.now))

    def tick(self) -> None:
        self.now = self.next_tick
        self.next_tick += 0.25
        for late in [late for late in self._late if late[0] <= self.now]:
            self._late.remove(late)
            self._put(late[1], late[2])
        for worker in self.workers.values():
            self.do(worker, worker.core.tick(self.now))

    def step(self) -> bool:
        """Does one thing; False where only time can pass."""
        actions: list[Action] = [partial(_pop, queue) for queue in self._channels.values() if queue]
        for name, worker in self.workers.items():
            if worker.plan_due and len(worker.steps) < worker.shape.max_inflight:
                actions.append(partial(self.plan, name))
            if worker.steps:
                actions.append(partial(self.complete, name))
        if not actions:
            return False
        self.rng.choice(actions)()
        return True

    def run(self, max_events: int = 60_000) -> None:
        """Until every request is done and every worker empty, however long that takes."""
        for count in range(max_events):
            moved = self.step()
            if self.quiet:
                return
            if not moved or count % 200 == 199:
                self.tick()
                if self.rng.random() < 0.3:
                    self.beat()
        raise AssertionError(f"still busy at {self.now:.1f} s: {self.state()}")

    @property
    def quiet(self) -> bool:
        """Nothing is under way, nothing live, nothing held."""
        return (
            not any(self._channels.values())
            and not self._late
            and all(request.done for request in self.requests.values())
            and all(
                not worker.core.beat().live and not worker.steps and not worker.core.blocks.held
                for worker in self.workers.values()
            )
        )

    def state(self) -> str:
        lines = [f"{w.name}: {w.core.beat()}" for w in self.workers.values()]
        lines += [f"{r.request_id[-4:]}: {r}" for r in self.requests.values() if not r.done]
        return "\n".join(lines)


def _pop(queue: deque[Action]) -> None:
    queue.popleft()()
