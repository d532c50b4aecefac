"""The I/O thread of a worker: it owns every socket, and moves every byte of KV.

The step thread hands it effects (``post``) and finds events in the inbox; the two share
nothing else, so that a long step delays no heartbeat, and a slow peer no step. A worker
whose step takes many times what it should falls silent on purpose: the router then takes
it for dead, which is what its requests need.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
from collections import deque
from dataclasses import dataclass, replace
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
from .effects import Effect, Tell
from .inbox import Inbox, RouterLost, RouterSaid, Stop
from .link import LinkState, RouterLink

log = logging.getLogger(__name__)

_MAX_EVENTS = 4096  # for the step thread, before sockets are left unread
_MAX_POSTS = 1024  # of the step thread, not yet looked at
_STUCK_AFTER_S = 30.0
_MAX_UNSENT = 4096  # messages for a router that takes none
_GOODBYE_MS = 500


@dataclass(frozen=True, slots=True)
class Status:
    """The worker as of now; ``num_taken`` counts the router's messages it has dealt with."""

    beat: WorkerBeat
    num_taken: int


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
        status: Status,
        *,
        join: str,
        identity: bytes,
        keys: Keys | None,
        clock: Clock,
        disturbed: ControlDisturbance | None = None,
    ) -> None:
        super().__init__(name="io", daemon=True)
        self.inbox = Inbox(_MAX_EVENTS, self._wake)
        self._link = link
        self._kv = kv
        self._status = status
        self._join = join
        self._identity = identity
        self._keys = keys
        self._clock = clock
        self._posts: queue.Queue[list[Effect]] = queue.Queue(_MAX_POSTS)
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._busy_since: float | None = None
        self._hung_after_s = 0.0
        self._unsent: deque[ToRouter] = deque()
        self._num_given = 0  # messages of the router put into the inbox
        self._given: deque[tuple[int, Key]] = deque()  # placements among them, with their number
        self._disturbed = disturbed or ControlDisturbance(FaultsSection(), "")

    # for the step thread

    def post(self, effects: list[Effect], status: Status) -> None:
        self._status = status
        if effects:
            self._posts.put(effects, timeout=_STUCK_AFTER_S)
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
        for socket, flags in self._kv.sockets():
            poller.register(socket, flags if reading else flags & ~zmq.POLLIN)
        ready = dict(poller.poll(self._patience_ms()))
        if self._waker in ready:
            os.eventfd_read(self._waker)
        now = self._clock()
        for message in self._disturbed.heard.due(now):
            self._hear(message, now)
        if ready.get(router, 0) & zmq.POLLIN:
            self._read_router(router, now)
        for socket, flags in self._kv.sockets():
            if flags & zmq.POLLIN and ready.get(socket, 0) & zmq.POLLIN:
                for event in self._kv.on_readable(socket, now):
                    self.inbox.put(event)
        self._take_posts()
        for event in self._kv.flush(now):
            self.inbox.put(event)
        self._tick(now)
        self._unsent.extend(self._disturbed.said.due(now))
        self._flush_router(router)

    def _patience_ms(self) -> int:
        due = min(self._link.next_deadline(), self._disturbed.next_due)
        until_word = max(0.0, due - self._clock())
        patience = int(until_word * 1000) + 1
        return patience if self._kv.retry_ms is None else min(patience, self._kv.retry_ms)

    def _read_router(self, router: zmq.Socket[bytes], now: float) -> None:
        while not self.inbox.full:
            try:
                data = router.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = TO_WORKER.decode(data)
            except MalformedMessage as error:
                log.warning("dropped from the router: %s", error)
                continue
            for one in self._disturbed.heard.take(message, now):
                self._hear(one, now)

    def _hear(self, message: ToWorker, now: float) -> None:
        if self._link.heard(message, now):
            self.inbox.put(RouterLost())
        if isinstance(message, Welcome):
            up()
        if isinstance(message, Place):
            self._given.append((self._num_given, message.key))
        self._num_given += 1
        self.inbox.put(RouterSaid(message))
        if self._link.state is LinkState.REFUSED:
            self.inbox.put(Stop())

    def _take_posts(self) -> None:
        now = self._clock()
        while True:
            try:
                effects = self._posts.get_nowait()
            except queue.Empty:
                return
            for effect in effects:
                match effect:
                    case Tell(message=message):
                        self._say(message)
                    case Send() | SendBlocks():
                        for event in self._kv.send(effect, now):
                            self.inbox.put(event)
                    case Write() | Pull():
                        for written in self._kv.write(effect):
                            self.inbox.put(written)

    def _tick(self, now: float) -> None:
        hung = self._busy_since is not None and now - self._busy_since > self._hung_after_s
        due = self._link.tick(None if hung else self._beat(), now)
        if due.router_lost:
            log.warning("the router has been silent too long; its requests are dropped")
            self._unsent.clear()
            self.inbox.put(RouterLost())
        silence = self._link.complaint(now)
        if silence is not None:
            log.warning(
                "no answer from a router at %s for %.0f s: it is not there, or the keys differ",
                self._join,
                silence,
            )
        if due.message is not None:
            self._say(due.message)

    def _beat(self) -> WorkerBeat:
        """The last status, with what has come in since and is not looked at yet."""
        status = self._status
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
