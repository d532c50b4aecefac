"""The messages of a chat, checked by hand: the error names the very part that is wrong."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

from ...core.errors import RequestError
from .body import well_formed

MAX_MESSAGES = 4096
MAX_PARTS = 4096

# What a client is told; ``parse_messages`` checks it, and says more.
Messages = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {
                    "role": {"enum": ["system", "developer", "user", "assistant"]},
                    "content": {
                        "anyOf": [
                            {"type": "string"},
                            {
                                "type": "array",
                                "minItems": 1,
                                "maxItems": MAX_PARTS,
                                "items": {
                                    "type": "object",
                                    "required": ["type", "text"],
                                    "properties": {
                                        "type": {"const": "text"},
                                        "text": {"type": "string"},
                                    },
                                },
                            },
                        ]
                    },
                },
            },
        }
    ),
]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def parse_messages(found: Any) -> tuple[dict[str, str], ...]:
    """Role and text of each, as a chat template takes them; raises RequestError."""
    if not isinstance(found, list) or not 1 <= len(found) <= MAX_MESSAGES:
        raise _wrong("messages", f"a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_message(value, f"messages[{index}]") for index, value in enumerate(found))


def _message(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, dict):
        raise _wrong(where, "an object with role and content")
    role = found.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{where}.role", "system, developer, user or assistant")
    for name in ("tool_calls", "function_call", "audio"):
        if found.get(name):
            raise RequestError(
                f"{where}.{name} is not supported here",
                param=f"{where}.{name}",
                code="unsupported_parameter",
            )
    return {"role": _ROLES[role], "content": _content(found.get("content"), f"{where}.content")}


def _content(found: Any, where: str) -> str:
    """A text, or the parts of one, which are joined by line ends."""
    if isinstance(found, str):
        return well_formed(found, where)
    if not isinstance(found, list) or not 1 <= len(found) <= MAX_PARTS:
        raise _wrong(where, "a text or a list of text parts")
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(found))


def _part(found: Any, where: str) -> str:
    if not isinstance(found, dict):
        raise _wrong(where, 'a part such as {"type": "text", "text": "..."}')
    if found.get("type") != "text":
        raise RequestError(
            f"{where}.type must be text: other content is not supported here",
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    text = found.get("text")
    if not isinstance(text, str):
        raise _wrong(f"{where}.text", "a text")
    return well_formed(text, f"{where}.text")


def _wrong(where: str, allowed: str) -> RequestError:
    return RequestError(f"{where} must be {allowed}", param=where, code="invalid_value")
