"""A sender, a receiver, their pools, their rims and a bad network between, in virtual time.

Everything that can come in another order, twice, late, damaged or not at all does so, by
one ``random.Random``. After ``calm_at`` the network is sound again and nobody aborts any
more; what is then still open must end by the protocol's own means.

The pools are honest: a block is filled when it is offered, read when the rim sends it,
overwritten when it is freed. So a block that is freed too early arrives wrong.

With blocks by reference D's rim reads P's pool piece by piece, as time passes, while P may
free and overwrite; what it then believes must be right all the same.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from kv_parts import ADDRESS, SETTINGS, D, P, handshake, token_of

from pdserve.core.generations import Generations
from pdserve.core.ids import Attempt, Medium
from pdserve.core.messages import FailureKind, Key
from pdserve.core.plan import PoolExport
from pdserve.kvtransfer.effects import (
    Effect,
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
from pdserve.kvtransfer.messages import Accepted, Chunk, Connect, Offer, ToReceiver, ToSender
from pdserve.kvtransfer.receiver import Receiver
from pdserve.kvtransfer.sender import Sender

_FREED = b"freed".ljust(SETTINGS.block_bytes, b"!")
_EMPTY = bytes(SETTINGS.block_bytes)
_EXPORT = PoolExport(Medium.SHM, "a name", bytes(16), 10_000)
_MEDIA = (Medium.SHM, Medium.TCP)


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances of each message (or chunk, or second) to meet this; delays in seconds."""

    loss: float = 0.0
    repeat: float = 0.0
    damage: float = 0.0
    max_delay: float = 0.01
    max_rim_delay: float = 0.01
    withdraw: float = 0.0
    abort: float = 0.0
    disconnect: float = 0.0
    sender_loses_peer: float = 0.0
    receiver_loses_peer: float = 0.0
    by_value: float = 1.0  # of a handshake, to find that D can't read P's pool


@dataclass(slots=True)
class Story:
    """One transfer, as both cores see it."""

    attempt: Attempt
    num_tokens: int
    num_cached_blocks: int
    blocks: tuple[int, ...] = ()  # P's
    theirs: tuple[int, ...] = ()  # D's
    content: tuple[bytes, ...] = ()
    expected: bool = False
    withdrawn: bool = False
    sent: list[Released | SendFailed] = field(default_factory=list)
    received: list[Runnable | ReceiveEnded] = field(default_factory=list)

    @property
    def delivered(self) -> bool:
        return bool(self.received) and isinstance(self.received[0], Runnable)


class World:
    def __init__(self, random: Random, faults: Faults, calm_at: float, router_at: float) -> None:
        self.random = random
        self.faults = faults
        self.calm_at = calm_at
        self.router_at = router_at  # from when on it has D drop what P is done with
        self.now = 0.0
        self.stories: dict[Attempt, Story] = {}
        self.generations = Generations.private(_EXPORT.num_blocks)
        mine = handshake(P, "secret-of-p", media=_MEDIA, exports=(_EXPORT,))
        self.sender = Sender(SETTINGS, mine, self.generations)
        self.receiver = Receiver(SETTINGS)
        self.of_p: dict[int, bytes] = {}
        self.of_d: dict[int, bytes] = {}
        self.reading: Counter[int] = Counter()
        self.writing: Counter[int] = Counter()
        self.knows_p = False  # D's rim has accepted a Connect: there is a way to and fro
        self._answers = handshake(D, ADDRESS.token, media=_MEDIA)
        self.num_stale = 0  # pulls that the generations showed to be worth nothing
        self.num_pulls = self.num_writes = 0
        self._agenda: list[tuple[float, int, Callable[[], object]]] = []
        self._num_events = 0
        self._tick()

    @property
    def calm(self) -> bool:
        return self.now >= self.calm_at

    def tell(self, num_tokens: int, num_cached_blocks: int, attempt: Attempt) -> Story:
        """The router places a request on both, which hear of it at about the same time."""
        num_blocks = SETTINGS.num_blocks(num_tokens)
        first = 1000 * len(self.stories)
        story = Story(
            attempt,
            num_tokens,
            min(num_cached_blocks, num_blocks),
            blocks=tuple(range(first, first + num_blocks)),
            theirs=tuple(range(first + num_blocks, first + 2 * num_blocks)),
            content=tuple(self.random.randbytes(SETTINGS.block_bytes) for _ in range(num_blocks)),
        )
        self.stories[attempt] = story
        for block in story.blocks:
            self.of_p[block] = _EMPTY
        self.later(self._soon(), lambda: self._expect(story))
        self.later(self._soon(), lambda: self._start(story))
        return story

    def run(self, until: float) -> None:
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, action = heapq.heappop(self._agenda)
            action()
        self.now = until

    def later(self, delay: float, action: Callable[[], object]) -> None:
        self._num_events += 1
        heapq.heappush(self._agenda, (self.now + delay, self._num_events, action))

    # the two cores

    def _soon(self) -> float:
        return self.random.uniform(0, 2)

    def _chance(self, probability: float) -> bool:
        return not self.calm and self.random.random() < probability

    def _expect(self, story: Story) -> None:
        story.expected = True
        self.act(
            self.receiver.expect(story.attempt, P, story.num_tokens, self.now),
        )
        if self._chance(self.faults.abort):
            self.later(self._soon(), lambda: self._abort(story, "hung up"))

    def _abort(self, story: Story, text: str) -> None:
        self.act(self.receiver.abort(story.attempt, text, self.now))

    def _start(self, story: Story) -> None:
        self.act(self.sender.start(story.attempt, ADDRESS, story.num_tokens, self.now))
        self.later(self._soon(), lambda: self._compute(story, 0))
        if self._chance(self.faults.withdraw):
            self.later(self._soon(), lambda: self._withdraw(story))

    def _withdraw(self, story: Story) -> None:
        if not story.sent:
            story.withdrawn = True
        self.act(self.sender.withdraw(story.attempt, self.now))

    def _compute(self, story: Story, done: int) -> None:
        """A chunk of the prompt; the step goes on even where the transfer is over."""
        end = min(len(story.blocks), done + self.random.randint(1, 4))
        if not story.sent:
            for index in range(done, end):
                self.of_p[story.blocks[index]] = story.content[index]
        self.act(self.sender.offer(story.attempt, story.blocks[:end], self.now))
        if end < len(story.blocks):
            self.later(self.random.uniform(0, 0.5), lambda: self._compute(story, end))
        else:
            token = token_of(story.attempt)
            self.act(self.sender.commit(story.attempt, token, self.now))

    def _reserved(self, story: Story) -> None:
        for block in story.theirs:
            self.of_d[block] = _EMPTY
        for index in range(story.num_cached_blocks):
            self.of_d[story.theirs[index]] = story.content[index]
        self.act(
            self.receiver.reserved(story.attempt, story.num_cached_blocks, story.theirs, self.now)
        )

    def _tick(self) -> None:
        self.act(self.sender.tick(self.now))
        self.act(self.receiver.tick(self.now))
        if self._chance(self.faults.disconnect / 4):
            self.knows_p = False
        if self._chance(self.faults.sender_loses_peer / 4):
            self.act(self.sender.peer_lost(D, "told so", self.now))
        if self._chance(self.faults.receiver_loses_peer / 4):
            self.act(self.receiver.peer_lost(P, "told so", self.now))
        begun = self.receiver.live(P)
        for story in self.stories.values():  # the router: P will never begin what it is done with
            waits = story.expected and Key.of(story.attempt) not in begun
            if waits and story.sent and self.now > self.router_at:
                self._abort(story, "the router does not list it")
        self.later(0.25, self._tick)

    # effects

    def act(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._transmit(effect, ())
                case SendBlocks():
                    self.reading.update(effect.blocks)
                    delay = self.random.uniform(0, self.faults.max_rim_delay)
                    self.later(delay, lambda effect=effect: self._send_chunk(effect))  # type: ignore[misc]
                case Write():
                    self.num_writes += 1
                    self.writing.update(effect.blocks)
                    delay = self.random.uniform(0, self.faults.max_rim_delay)
                    self.later(delay, lambda effect=effect: self._write(effect))  # type: ignore[misc]
                case Pull():
                    self.writing.update(effect.blocks)
                    self.num_pulls += 1
                    self._pull(effect, [])
                case Reserve(attempt=attempt):
                    story = self.stories[attempt]
                    self.later(self._soon(), lambda story=story: self._reserved(story))  # type: ignore[misc]
                case Granted(attempt=attempt):
                    assert self.sender.granted(attempt)
                case Released() | SendFailed():
                    self._free_p(effect)
                case Runnable() | ReceiveEnded():
                    self._free_d(effect)

    def _free_p(self, effect: Released | SendFailed) -> None:
        story = self.stories[effect.attempt]
        assert not any(self.reading[block] for block in story.blocks), "freed while being read"
        story.sent.append(effect)
        self.generations.bump(story.blocks)  # they are another's, who writes over them
        for block in story.blocks:
            self.of_p[block] = _FREED

    def _free_d(self, effect: Runnable | ReceiveEnded) -> None:
        story = self.stories[effect.attempt]
        assert not any(self.writing[block] for block in story.theirs), "freed while written"
        if isinstance(effect, Runnable):
            assert tuple(self.of_d[block] for block in story.theirs) == story.content
            assert effect.token == token_of(story.attempt)
        else:
            for block in story.theirs:
                self.of_d.pop(block, None)
            if "before there was room" in effect.text:
                return  # what answers a late ``reserved``
        story.received.append(effect)  # check() wants exactly one

    # the rims and the network

    def _send_chunk(self, effect: SendBlocks) -> None:
        frames = tuple(self.of_p[block] for block in effect.blocks)
        assert _FREED not in frames
        if isinstance(effect.message, Offer):
            frames = ()
        self.reading.subtract(effect.blocks)
        self._transmit(effect, frames)
        self.act(self.sender.sent(effect.attempt, effect.message.first_block, self.now))

    def _write(self, effect: Write) -> None:
        frames = [bytes(frame) for frame in effect.frames]
        ok = all(frame[0] != 0xFF or frame[1:] != b"damaged".ljust(15) for frame in frames)
        if ok:
            self.of_d.update(zip(effect.blocks, frames, strict=True))
        self.writing.subtract(effect.blocks)
        self.act(self.receiver.written(effect.attempt, effect.first_block, ok, self.now))

    def _pull(self, effect: Pull, copied: list[bytes]) -> None:
        """One block after the other; after the last one it is confirmed, or worth nothing."""
        if len(copied) < len(effect.theirs):
            copied.append(self.of_p[effect.theirs[len(copied)]])
            # All blocks together take as long as a read may: many slow ones outlast the test.
            delay = self.random.uniform(0, self.faults.max_rim_delay) / len(effect.theirs)
            self.later(delay, lambda: self._pull(effect, copied))
            return
        ok = self.generations.are(effect.theirs, effect.generations)
        self.num_stale += not ok
        self.of_d.update(zip(effect.blocks, copied, strict=True))
        self.writing.subtract(effect.blocks)
        ok = ok and not self._chance(self.faults.damage)
        self.act(self.receiver.written(effect.attempt, effect.first_block, ok, self.now))

    def _transmit(self, effect: Send | SendBlocks, frames: tuple[bytes, ...]) -> None:
        message = effect.message
        if effect.peer == P and not self.knows_p:
            return
        for _ in range(2 if self._chance(self.faults.repeat) else 1):
            if self._chance(self.faults.loss):
                continue
            if frames and self._chance(self.faults.damage):
                frames = (*frames[:-1], b"\xff" + b"damaged".ljust(15))
            delay = self.random.uniform(0, self.faults.max_delay if not self.calm else 0.01)
            if effect.peer == P:
                self.later(delay, lambda: self._arrive_at_p(message))  # type: ignore[arg-type]
            else:
                self.later(delay, lambda frames=frames: self._arrive_at_d(message, frames))  # type: ignore[misc, arg-type]

    def _arrive_at_p(self, message: ToSender) -> None:
        self.act(self.sender.receive(D, message, self.now))

    def _arrive_at_d(self, message: ToReceiver, frames: tuple[bytes, ...]) -> None:
        if isinstance(message, Connect):
            works = self.random.random() >= self.faults.by_value
            answer = self._answers.answer(message, lambda _: None if works else "not here")
            assert isinstance(answer, Accepted)
            self.knows_p = True
            self._transmit(Send(P, answer), ())
        elif self.knows_p:
            assert isinstance(message, Chunk) or not frames
            views = [memoryview(frame) for frame in frames]
            self.act(self.receiver.receive(P, message, views, self.now))

    # the account

    def check(self) -> None:
        """Everything is over, once, on both sides, and no block is left behind."""
        assert not +self.reading and not +self.writing
        for story in self.stories.values():
            assert len(story.sent) == 1, story
            assert len(story.received) == 1, story
            assert {self.of_p[block] for block in story.blocks} == {_FREED}
            held = [block for block in story.theirs if block in self.of_d]
            assert len(held) == (len(story.theirs) if story.delivered else 0), story
            if isinstance(story.sent[0], Released) and not story.withdrawn:
                assert story.delivered, story  # never a success that did not arrive
            if isinstance(story.sent[0], SendFailed):
                assert isinstance(story.sent[0].kind, FailureKind) and story.sent[0].text
        assert self.sender.live(D) == () and self.receiver.live(P) == ()
