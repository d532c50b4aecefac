"""A thousand calls that are wrong in every way we can think of, over bare sockets.

Each is answered with a 4xx or ends in a clean close, in bounded time; the next good one is
served; and what they cost the router in memory and open files comes back.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served import Server

from pdserve.core.errors import RequestError
from pdserve.deploy import fetch
from pdserve.router.api.calls import parse_chat, parse_completion

NUMBER = 1000
ANSWER_LIMIT_S = 8.0
MEMORY = 48 << 20  # bytes that the router may keep of all of them

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
    },
    PLAIN: {"model": "tiny", "prompt": "hi", "max_tokens": 2},
}
PARSE = {CHAT: parse_chat, PLAIN: parse_completion}
FIELDS = sorted(
    (
        *("model", "messages", "prompt", "max_tokens", "n", "stop", "stream", "temperature"),
        *("top_p", "top_k", "min_p", "seed", "logit_bias", "logprobs", "stream_options"),
        *("stop_token_ids", "presence_penalty", "repetition_penalty", "slo", "priority"),
        *("min_tokens", "echo", "route", "tools", "response_format", "max_completion_tokens"),
    )
)

text = st.text(st.characters(codec=None, exclude_categories=()), max_size=30)
number = st.one_of(
    st.integers(),
    st.sampled_from((2**31, 2**63, -(2**63) - 1, 10**300, -(10**4000))),
    st.floats(allow_nan=True, allow_infinity=True),
)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), number, text),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(text, inner, max_size=6)),
    max_leaves=20,
)
path = st.sampled_from((CHAT, PLAIN))
nested = st.integers(1, 50_000).map(lambda depth: "[" * depth + "]" * depth)


@dataclass(frozen=True)
class Sent:
    """``whole``: it is a request, and an answer must come. Else a close is as good."""

    data: bytes
    whole: bool
    hang_up: bool = False


def request(where: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {where} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogatepass") + body


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def is_wrong(where: str, body: bytes) -> bool:
    """What a changed field may be by chance is right."""
    try:
        PARSE[where](body)
    except RequestError:
        return True
    return False


@st.composite
def wrong_bodies(draw: st.DrawFn) -> Sent:
    where = draw(path)
    kind = draw(st.integers(0, 4))
    good = dict(GOOD[where])
    if kind == 0:
        body = draw(st.binary(max_size=200))
    elif kind == 1:
        body = dumped(draw(junk))
    elif kind == 2:
        body = draw(nested).encode()
    elif kind == 3:
        body = dumped(good)[: draw(st.integers(0, len(dumped(good)) - 1))]
    else:
        field = draw(st.sampled_from(FIELDS))
        value = draw(st.one_of(junk, st.lists(number, min_size=1, max_size=400)))
        body = dumped(good | {field: value})
    if not is_wrong(where, body):
        body = dumped(good | {"max_tokens": draw(st.sampled_from((0, -1, "5", 10**30)))})
    return Sent(request(where, body), whole=True)


@st.composite
def wrong_heads(draw: st.DrawFn) -> Sent:
    where = draw(path)
    body = dumped(GOOD[where])
    broken = draw(
        st.sampled_from(
            (
                "Content-Length: -1",
                "Content-Length: " + "9" * 40,
                "Content-Length: 1e3",
                "Content-Length: 5\r\nContent-Length: 6",
                "Transfer-Encoding: chunked\r\nContent-Length: 5",
                "Transfer-Encoding: nonsense",
                "Content-Encoding: gzip\r\nContent-Length: 3",
                "X: " + "x" * 20_000,
                "\r\n".join(f"X{index}: x" for index in range(500)),
                ": no name",
                "no colon",
                "Na\x00me: x",
                "Name: a\x00b",
                " leading: x",
                "Expect: something-else\r\nContent-Length: 0",
            )
        )
    )
    start = draw(
        st.sampled_from(
            (
                f"POST {where} HTTP/1.1",
                f"POST {where} HTTP/9.9",
                f"POST {where}",
                f"post {where} HTTP/1.1",
                "POST " + "/x" * 6000 + " HTTP/1.1",
                f"BREW {where} HTTP/1.1",
                f"GET {where} HTTP/1.1",
                "POST http://[::1 HTTP/1.1",
                "POST /v1/%ff%00%zz HTTP/1.1",
                "PRI * HTTP/2.0",
            )
        )
    )
    return Sent(f"{start}\r\nHost: x\r\n{broken}\r\n\r\n".encode("latin-1") + body, whole=False)


@st.composite
def rubbish(draw: st.DrawFn) -> Sent:
    return Sent(draw(st.binary(min_size=1, max_size=300)) + b"\r\n\r\n", whole=False)


@st.composite
def chunks(draw: st.DrawFn) -> Sent:
    where = draw(path)
    head = f"POST {where} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    sizes = draw(st.sampled_from((b"zz", b"-1", b"ffffffffffffffffff", b"5;" + b"x" * 9000, b"")))
    return Sent(head + sizes + b"\r\nhello\r\n0\r\n\r\n", whole=False)


@st.composite
def cut_short(draw: st.DrawFn) -> Sent:
    where = draw(path)
    fields = {"stream": draw(st.booleans()), "max_tokens": 100}
    data = request(where, dumped(GOOD[where] | fields))
    return Sent(data[: draw(st.integers(1, len(data)))], whole=False, hang_up=True)


calls = st.one_of(wrong_bodies(), wrong_bodies(), wrong_heads(), rubbish(), chunks(), cut_short())


def send(at: tuple[str, int], sent: Sent) -> bytes:
    """The answer's first line; empty where it was closed. A hang is an exception."""
    with socket.create_connection(at, timeout=ANSWER_LIMIT_S) as connection:
        with contextlib.suppress(ConnectionError):  # it may be closed while we still send
            connection.sendall(sent.data)
        if sent.hang_up:
            return b""
        end = time.monotonic() + ANSWER_LIMIT_S
        found = b""
        with contextlib.suppress(ConnectionError):
            while b"\r\n" not in found:
                more = connection.recv(4096)
                if not more:
                    break
                found += more
                assert time.monotonic() < end
        return found.partition(b"\r\n")[0]


def test_a_thousand_wrong_calls(simulated: Server) -> None:
    parts = urlsplit(simulated.url)
    assert parts.hostname is not None and parts.port is not None
    at = (parts.hostname, parts.port)
    router = psutil.Process(int(fetch.own(simulated.url)["pid"]))
    seen: Counter[str] = Counter()

    def works() -> None:
        for where, body in GOOD.items():
            assert send(at, Sent(request(where, dumped(body)), True)) == b"HTTP/1.1 200 OK"

    @settings(
        max_examples=NUMBER,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(calls)
    def one(sent: Sent) -> None:
        line = send(at, sent)
        found = re.fullmatch(rb"HTTP/\d\.\d (\d{3}) .*", line)
        seen[found[1].decode() if found else "closed"] += 1
        if sent.whole:
            assert found and found[1].startswith(b"4"), (line, sent.data[:2000])
        else:  # where only its head is odd, it may be a good call
            assert not line or (found and found[1][:1] in b"24"), (line, sent.data[:2000])
        if sum(seen.values()) % 50 == 0:
            works()

    works()
    for _ in range(50):  # what is made once is made
        send(at, Sent(request(PLAIN, b"[" * 50_000), True))
    simulated.at_rest()
    memory, files = router.memory_info().rss, router.num_fds()
    one()
    assert sum(seen.values()) >= NUMBER * 0.95, seen  # it stops where it finds nothing new
    assert seen["400"] > NUMBER / 4 and seen["closed"], seen
    works()
    simulated.at_rest()
    simulated.wait_for("its files back", lambda: router.num_fds() <= files + 3, 10.0)
    assert router.memory_info().rss < memory + MEMORY
