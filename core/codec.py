"""Messages to bytes and back: msgpack of ``[tag, fields]``, validated on arrival.

A room lists its message classes once in a ``Codec``. What does not validate raises
``MalformedMessage``; the socket's owner counts it, logs it once a peer, and drops it.
Nothing on the wire names code: a tag is an index into that list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import msgpack
from pydantic import TypeAdapter, ValidationError

from .errors import MalformedMessage

MAX_MESSAGE_BYTES = 16 << 20

M = TypeVar("M")


class Codec(Generic[M]):
    """Encodes and decodes the given frozen dataclasses, and nothing else."""

    def __init__(self, *messages: type[M]) -> None:
        self._tags = {cls: tag for tag, cls in enumerate(messages)}
        self._adapters: list[TypeAdapter[M]] = [TypeAdapter(cls) for cls in messages]

    def encode(self, message: M) -> bytes:
        tag = self._tags[type(message)]
        packed = msgpack.packb([tag, _plain(message)], use_bin_type=True)
        assert isinstance(packed, bytes)
        return packed

    def decode(self, data: bytes | memoryview) -> M:
        """Raises MalformedMessage for anything but a message of the list within its bounds."""
        if len(data) > MAX_MESSAGE_BYTES:
            raise MalformedMessage(f"a message of {len(data)} bytes (at most {MAX_MESSAGE_BYTES})")
        try:
            body = msgpack.unpackb(data, raw=False, strict_map_key=True)
        except (ValueError, msgpack.UnpackException) as error:
            raise MalformedMessage(f"not msgpack: {error}") from error
        match body:
            case [int(tag), dict(values)] if 0 <= tag < len(self._adapters):
                try:
                    return self._adapters[tag].validate_python(values)
                except ValidationError as error:
                    first = error.errors(include_url=False, include_input=False)[0]
                    where = ".".join(str(part) for part in first["loc"])
                    raise MalformedMessage(f"{where}: {first['msg']}") from None
            case _:
                raise MalformedMessage("not a [tag, fields] pair of this protocol")


def _plain(value: Any) -> Any:
    """A dataclass tree as dicts and lists; scalars as they are."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    names = _names(kind)  # type: ignore[arg-type]
    if names is not None:
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, bytes | str):
        return value
    if isinstance(value, Sequence):
        if value and not isinstance(value[0], int | float | str):
            return [_plain(item) for item in value]
        return list(value)
    return value


_SCALARS = frozenset((int, float, str, bytes, bool, type(None)))


@cache
def _names(kind: Any) -> tuple[str, ...] | None:
    """Of a dataclass's fields."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else None
