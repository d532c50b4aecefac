"""The chat at a terminal, against a router that serves."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_worker import FakeWorker
from router_net import Router, run, split, until

from pdserve import cli
from pdserve.deploy import chat
from pdserve.deploy.chat import Chat, Options, Refused
from pdserve.deploy.fetch import Unreachable


def against(work: Callable[[Router, FakeWorker], None], **sections: Any) -> None:
    """Runs the blocking ``work`` beside a router with two workers."""

    async def main() -> None:
        async with split(**sections) as (up, _, decode):
            await asyncio.to_thread(work, up, decode)
            await until(lambda: up.service.dispatch.num_requests == 0)

    run(main())


def test_a_conversation_remembers_what_was_said() -> None:
    def work(up: Router, decode: FakeWorker) -> None:
        talk = Chat.open(Options(up.url, max_tokens=5, system="be brief"))
        first = "".join(talk.say("hello"))
        assert len(first) == 5
        assert talk.timeline is not None and talk.timeline["output_tokens"] == 5
        "".join(talk.say("and now"))
        assert [message["role"] for message in talk.messages] == [
            *("system", "user", "assistant", "user", "assistant")
        ]
        assert len(decode.placed[1].prompt) > len(decode.placed[0].prompt) + 5
        talk.clear()
        assert talk.messages == [{"role": "system", "content": "be brief"}]

    against(work)


def test_an_answer_that_is_left_ends_at_the_workers_and_is_remembered_as_far_as_it_came() -> None:
    def work(up: Router, decode: FakeWorker) -> None:
        decode.hold_after = 3
        talk = Chat.open(Options(up.url, max_tokens=50))
        pieces = talk.say("hello")
        begun = next(pieces)
        pieces.close()  # as Ctrl-C does
        assert talk.messages[-1] == {"role": "assistant", "content": begun}

    against(work)


def test_what_is_refused_is_said_and_forgotten() -> None:
    def work(up: Router, decode: FakeWorker) -> None:
        talk = Chat.open(Options(up.url, max_tokens=99_999))
        with pytest.raises(Refused, match="max_tokens is 99999"):
            list(talk.say("hello"))
        assert talk.messages == []

    against(work)


def test_nobody_there() -> None:
    with pytest.raises(Unreachable, match="no answer from"):
        Chat.open(Options("http://127.0.0.1:1"))


def test_the_command_answers_a_message_or_what_is_piped_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(up: Router, decode: FakeWorker) -> None:
        assert cli.main(["chat", "--url", up.url, "--max-tokens", "6", "hello"]) == 0
        given = capsys.readouterr().out
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
        assert cli.main(["chat", "--url", up.url, "--max-tokens", "6"]) == 0
        assert capsys.readouterr().out == given and len(given) == 7
        assert cli.main(["chat", "--url", up.url, "--max-tokens", "99999", "hello"]) == 1
        assert capsys.readouterr().err.startswith("pdserve: max_tokens is 99999")

    against(work)


def test_a_session_at_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(("", "/help", "hello", "/clear", "too long", "/quit"))

    def work(up: Router, decode: FakeWorker) -> None:
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
        said = chat.Chat.say

        def say(self: Chat, text: str) -> Iterator[str]:
            if text == "too long":
                raise KeyboardInterrupt
            return said(self, text)

        monkeypatch.setattr(chat.Chat, "say", say)
        assert chat.run(Options(up.url, max_tokens=5), None) == 0

    against(work)
    out = capsys.readouterr().out
    assert out.startswith("tiny at http://") and out.rstrip().endswith("■ stopped")
    assert next(typed, None) is None


def test_the_summary_of_an_answer() -> None:
    one = {
        "prefill_worker": "p",
        "decode_worker": "d",
        "ttft_ms": 120.4,
        "tpot_ms": 23.44,
        "prompt_tokens": 7,
        "output_tokens": 9,
    }
    assert chat.summary(one) == "first token 120 ms · 23.4 ms a token · 7 in, 9 out · p → d"
    alone = chat.summary(one | {"decode_worker": "p", "tpot_ms": None})
    assert alone == "first token 120 ms · 7 in, 9 out · p"
