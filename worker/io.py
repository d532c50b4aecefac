"""The I/O thread of a worker: it owns every socket, and moves every byte of KV.

What it hears it applies to the core itself, where the desk is free (see ``desk``), and does
what comes of it; the step thread hands it effects (``post``), too. It waits for no step, and
no step for a peer: a long step delays no heartbeat. A worker whose step takes many times what
it should falls silent on purpose: the router then takes it for dead, which is what its requests
need.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections import deque
from dataclasses import replace
from typing import Any

import zmq

from ..core.clock import Clock
from ..core.config import FaultsSection
from ..core.disturbance import Disturbance
from ..core.errors import MalformedMessage
from ..core.half_open import notice_silence
from ..core.keys import Keys, admit, secure_client
from ..core.messages import (
    MAX_LIVE,
    TO_ROUTER,
    TO_WORKER,
    Key,
    Place,
    ToRouter,
    ToWorker,
    Welcome,
    WorkerBeat,
)
from ..core.supervised import up
from ..kvtransfer.effects import Pull, Send, SendBlocks, Write
from ..kvtransfer.media.disturbed import KvMedium
from .core import WorkerCore
from .desk import Desk
from .effects import Effect, Tell
from .inbox import Event, Inbox, RouterLost, RouterSaid, Stop
from .link import LinkState, RouterLink

log = logging.getLogger(__name__)

_MAX_EVENTS = 4096  # not yet applied, before sockets are left unread
_MAX_READS = 64  # of the router's messages, before the others have their turn
_MAX_POSTS = 1024  # of the step thread, not yet looked at
_STUCK_AFTER_S = 30.0
_MAX_UNSENT = 4096  # messages for a router that takes none
_GOODBYE_MS = 500


class ControlDisturbance:
    """What is done on purpose to what the router and the worker ``name`` say to each other."""

    def __init__(self, faults: FaultsSection, name: str) -> None:
        rng = random.Random(f"{faults.seed}/{name}/control")
        self.heard: Disturbance[ToWorker] = Disturbance(faults.control, rng, in_order=True)
        self.said: Disturbance[ToRouter] = Disturbance(faults.control, rng, in_order=True)

    @property
    def next_due(self) -> float:
        return min(self.heard.next_due, self.said.next_due)


class IoThread(threading.Thread):
    """Made, started and stopped by the step thread; ``post`` and the step marks are its calls.

    ``stop`` sends what is still unsent to the router, for a moment, and closes everything.
    """

    def __init__(
        self,
        link: RouterLink,
        kv: KvMedium,
        core: WorkerCore,
        *,
        join: str,
        identity: bytes,
        keys: Keys | None,
        clock: Clock,
        disturbed: ControlDisturbance | None = None,
    ) -> None:
        super().__init__(name="io", daemon=True)
        self.inbox = Inbox(_MAX_EVENTS, self._wake)
        self.desk = Desk(core, self.inbox, clock)
        self._link = link
        self._kv = kv
        self._join = join
        self._identity = identity
        self._keys = keys
        self._clock = clock
        self._posts: deque[list[Effect]] = deque()
        self._room = threading.Condition()  # for more posts
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._busy_since: float | None = None
        self._hung_after_s = 0.0
        self._unsent: deque[ToRouter] = deque()
        self._num_given = 0  # messages of the router put into the inbox
        self._given: deque[tuple[int, Key]] = deque()  # placements among them, with their number
        self._disturbed = disturbed or ControlDisturbance(FaultsSection(), "")

    # for the step thread

    def post(self, effects: list[Effect]) -> None:
        if not effects:
            return
        with self._room:
            there = self._room.wait_for(lambda: len(self._posts) < _MAX_POSTS, _STUCK_AFTER_S)
            assert there, "the I/O thread hangs"
            self._posts.append(effects)
        self._wake()

    def step_begins(self, hung_after_s: float) -> None:
        """The steps in flight should not take so long without a result."""
        self._hung_after_s = hung_after_s
        if self._busy_since is None:
            self._busy_since = self._clock()

    def step_ended(self, *, idle: bool) -> None:
        """A step was completed; ``idle`` where none is left in flight."""
        self._busy_since = None if idle else self._clock()

    def stop(self) -> None:
        self._stopping.set()
        self._wake()
        self.join(_STUCK_AFTER_S)
        assert not self.is_alive(), "the I/O thread hangs"
        os.close(self._waker)

    def _wake(self) -> None:
        os.eventfd_write(self._waker, 1)

    # the thread

    def run(self) -> None:
        try:
            with zmq.Context() as context:
                if self._keys is not None:
                    with admit(context, self._keys):
                        self._serve(context)
                else:
                    self._serve(context)
        except BaseException as error:  # noqa: BLE001 (handed to the step thread, which raises it)
            self.inbox.put(Stop(error))
            self.inbox.wake()
        finally:
            self._kv.close()

    def _serve(self, context: zmq.Context[Any]) -> None:
        router = context.socket(zmq.DEALER)
        router.setsockopt(zmq.ROUTING_ID, self._identity)
        router.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a router that is not there
        router.sndhwm = router.rcvhwm = _MAX_UNSENT
        router.linger = _GOODBYE_MS
        notice_silence(router)
        if self._keys is not None:
            secure_client(router, self._keys)
        with router:
            router.connect(self._join)
            while not self._stopping.is_set():
                self._turn(router)
            self._take_posts()
            self._flush_router(router)
        for what, way in (("from", self._disturbed.heard), ("to", self._disturbed.said)):
            if way.fates.total():
                log.info("messages %s the router disturbed on purpose: %s", what, way)

    def _turn(self, router: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(self._waker, zmq.POLLIN)
        reading = not self.inbox.full
        poller.register(router, (zmq.POLLIN * reading) | (zmq.POLLOUT * bool(self._unsent)))
        sockets = self._kv.sockets()
        for socket, flags in sockets:
            poller.register(socket, flags if reading else flags & ~zmq.POLLIN)
        ready = dict(poller.poll(self._patience_ms()))
        if self._waker in ready:
            os.eventfd_read(self._waker)
        now = self._clock()
        events: list[Event] = []
        for message in self._disturbed.heard.due(now):
            events += self._hear(message, now)
        if ready.get(router, 0) & zmq.POLLIN:
            events += self._read_router(router, now)
        for socket, _ in sockets:
            if ready.get(socket, 0) & zmq.POLLIN:
                events += self._kv.on_readable(socket, now)
        events += self._take_posts()
        events += self._kv.flush(now)
        self._deal_with(events)
        now = self._clock()
        if now >= self._link.next_deadline():
            self._deal_with(self._tick(now))
        self._unsent.extend(self._disturbed.said.due(now))
        self._flush_router(router)

    def _deal_with(self, events: list[Event]) -> None:
        """Applies them, does what comes of it, and applies what comes of that."""
        due = self._clock() >= self.desk.next_tick
        while events or due:
            due = False
            self.inbox.put(*events)
            wanted = self.desk.try_to_catch_up(self._posts.append)
            events = self._take_posts()
            if wanted:
                self.inbox.wake()

    def _patience_ms(self) -> int:
        due = min(self._link.next_deadline(), self.desk.next_tick, self._disturbed.next_due)
        patience = int(max(0.0, due - self._clock()) * 1000) + 1
        return patience if self._kv.retry_ms is None else min(patience, self._kv.retry_ms)

    def _read_router(self, router: zmq.Socket[bytes], now: float) -> list[Event]:
        events: list[Event] = []
        for _ in range(_MAX_READS):
            try:
                data = router.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = TO_WORKER.decode(data)
            except MalformedMessage as error:
                log.warning("dropped from the router: %s", error)
                continue
            for one in self._disturbed.heard.take(message, now):
                events += self._hear(one, now)
        return events

    def _hear(self, message: ToWorker, now: float) -> list[Event]:
        events: list[Event] = []
        if self._link.heard(message, now):
            events.append(RouterLost())
        if isinstance(message, Welcome):
            up()
        if isinstance(message, Place):
            self._given.append((self._num_given, message.key))
        self._num_given += 1
        events.append(RouterSaid(message))
        if self._link.state is LinkState.REFUSED:
            events.append(Stop())
        return events

    def _take_posts(self) -> list[Event]:
        """Does what was asked for; what is known of it already."""
        now = self._clock()
        events: list[Event] = []
        while self._posts:
            with self._room:
                effects = self._posts.popleft()
                self._room.notify()
            for effect in effects:
                match effect:
                    case Tell(message=message):
                        self._say(message)
                    case Send() | SendBlocks():
                        events += self._kv.send(effect, now)
                    case Write() | Pull():
                        events += self._kv.write(effect)
        return events

    def _tick(self, now: float) -> list[Event]:
        """The router's due: a beat or a hello, and what its silence means."""
        events: list[Event] = []
        hung = self._busy_since is not None and now - self._busy_since > self._hung_after_s
        due = self._link.tick(None if hung else self._beat(), now)
        if due.router_lost:
            log.warning("the router has been silent too long; its requests are dropped")
            self._unsent.clear()
            events.append(RouterLost())
        silence = self._link.complaint(now)
        if silence is not None:
            log.warning(
                "no answer from a router at %s for %.0f s: it is not there, or the keys differ",
                self._join,
                silence,
            )
        if due.message is not None:
            self._say(due.message)
        return events

    def _beat(self) -> WorkerBeat:
        """The last status, with what has come in since and is not looked at yet."""
        status = self.desk.status()
        while self._given and self._given[0][0] < status.num_taken:
            self._given.popleft()
        known = set(status.beat.live)
        fresh = [key for _, key in self._given if key not in known]
        return replace(status.beat, live=(*status.beat.live, *fresh)[:MAX_LIVE])

    def _say(self, message: ToRouter) -> None:
        if len(self._unsent) >= _MAX_UNSENT:  # beats and leases find out what it missed
            self._unsent.popleft()
        self._unsent.extend(self._disturbed.said.take(message, self._clock()))

    def _flush_router(self, router: zmq.Socket[bytes]) -> None:
        while self._unsent:
            try:
                router.send(TO_ROUTER.encode(self._unsent[0]), zmq.NOBLOCK)
            except zmq.Again:
                return
            self._unsent.popleft()
