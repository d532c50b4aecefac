"""A chat at a terminal with a running deployment. Answers stream; each says what it took.

Ctrl-C stops an answer, or leaves where there is none. A message that is given, or piped in,
is answered once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import PdserveError
from . import fetch, status

_TIMEOUT_S = 600.0  # between two pieces of an answer
_HELP = "/clear forgets what was said, /quit leaves; Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True)
class Options:
    url: str
    max_tokens: int | None = None
    temperature: float | None = None
    system: str | None = None
    route: str | None = None


class Refused(PdserveError):
    """What the server said instead of an answer."""


@dataclass(slots=True)
class Chat:
    """``say`` yields the answer's text as it comes; then ``timeline`` is what it took."""

    options: Options
    model: str
    knows_chat: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    timeline: dict[str, Any] | None = None

    @staticmethod
    def open(options: Options) -> Chat:
        """Raises Unreachable where no router answers."""
        live = status.read_live(options.url)
        chat = Chat(options, live.model, live.chat)
        chat.clear()
        return chat

    def clear(self) -> None:
        system = self.options.system
        self.messages = [{"role": "system", "content": system}] if system is not None else []

    def say(self, text: str) -> Generator[str, None, None]:
        """Raises Unreachable or Refused. Left half read, it ends at the server too, and what
        was read of it has been said."""
        self.timeline = None
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            with contextlib.closing(self._events(text)) as events:
                for event in events:
                    if piece := self._take(event):
                        answer.append(piece)
                        yield piece
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()

    def _events(self, text: str) -> Generator[dict[str, Any], None, None]:
        options = self.options
        asked = {"messages": self.messages} if self.knows_chat else {"prompt": text}
        given = {
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "route": options.route,
        }
        body = {"model": self.model, "stream": True, **asked}
        body |= {name: value for name, value in given.items() if value is not None}
        path = "/v1/chat/completions" if self.knows_chat else "/v1/completions"
        return fetch.post_events(
            options.url.rstrip("/") + path, body, _TIMEOUT_S, {"X-Pdserve-Timeline": "1"}
        )

    def _take(self, event: dict[str, Any]) -> str:
        if "error" in event:
            raise Refused(str(event["error"].get("message")))
        if event.get("timelines"):
            self.timeline = event["timelines"][0]
        if not event.get("choices"):
            return ""
        choice = event["choices"][0]
        found = choice["delta"].get("content") if self.knows_chat else choice["text"]
        return found or ""


def run(options: Options, message: str | None) -> int:
    """The exit code."""
    chat = Chat.open(options)
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read()
    if message is not None:
        _print(chat, message)
        return 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing and history for input())
    print(f"{chat.model} at {options.url}. {_HELP}.")
    with contextlib.suppress(EOFError):
        while True:
            match input("\n> ").strip():
                case "":
                    continue
                case "/quit" | "/exit":
                    return 0
                case "/clear":
                    chat.clear()
                case "/help":
                    print(_HELP)
                case text:
                    _answer(chat, text)
    print()
    return 0


def _answer(chat: Chat, text: str) -> None:
    """One turn of a chat that goes on, whatever becomes of it."""
    try:
        _print(chat, text)
    except KeyboardInterrupt:
        print("\n■ stopped")
    except PdserveError as error:
        print(f"✕ {error}", file=sys.stderr)


def _print(chat: Chat, text: str) -> None:
    with contextlib.closing(chat.say(text)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    if chat.timeline is not None and sys.stdout.isatty():
        print(f"\x1b[2m{summary(chat.timeline)}\x1b[0m")


def summary(timeline: dict[str, Any]) -> str:
    """One line: times, tokens, workers."""
    workers = list(dict.fromkeys((timeline["prefill_worker"], timeline["decode_worker"])))
    parts = [f"first token {timeline['ttft_ms']:.0f} ms"]
    if timeline["tpot_ms"] is not None:
        parts.append(f"{timeline['tpot_ms']:.1f} ms a token")
    parts.append(f"{timeline['prompt_tokens']} in, {timeline['output_tokens']} out")
    parts.append(" → ".join(workers))
    return " · ".join(parts)
