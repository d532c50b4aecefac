"""What is no message is refused before anything is made of it."""

from __future__ import annotations

from dataclasses import dataclass

import msgpack
import pytest

from pdserve.core.codec import MAX_MESSAGE_BYTES, Codec
from pdserve.core.errors import MalformedMessage


@dataclass(frozen=True, slots=True)
class Note:
    text: str


CODEC: Codec[Note] = Codec(Note)


def test_a_message_goes_round() -> None:
    assert CODEC.decode(CODEC.encode(Note("here"))) == Note("here")
    assert CODEC.decode(memoryview(CODEC.encode(Note("here")))) == Note("here")


def test_its_bytes_are_bounded() -> None:
    room = MAX_MESSAGE_BYTES - len(CODEC.encode(Note("")))
    largest = CODEC.encode(Note("x" * (room - 4)))  # a long text's length takes four bytes more
    assert len(largest) == MAX_MESSAGE_BYTES and CODEC.decode(largest)
    with pytest.raises(MalformedMessage, match=r"a message of 16777217 bytes \(at most 16777216\)"):
        CODEC.decode(CODEC.encode(Note("x" * (room - 3))))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, {"text": "no such tag"}]),
        msgpack.packb([-1, {"text": "no such tag"}]),
        msgpack.packb([0, {"text": 5}]),
        msgpack.packb([0, {}]),
        msgpack.packb({"text": "no tag"}),
        msgpack.packb([0, {"text": "more"}]) + b"\x00",
    ],
)
def test_what_is_no_message(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        CODEC.decode(body)
