"""Workers die, and the client sees a pause; clients leave, and the workers hear of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_worker import FakeWorker, text_of
from router_net import MODEL, Router, router, run, split, until

from pdserve.core.ids import Role, Task
from pdserve.core.messages import FailureKind, WorkerBeat
from pdserve.router import answer, dispatch, fleet, membership

PLAIN = "/v1/completions"
DISAGGREGATED = {"policy": "disaggregated"}


def text(num_tokens: int) -> str:
    return text_of(tuple(b"hello"), num_tokens)


async def read(stream: AsyncIterator[Any], num_tokens: int) -> str:
    """The text of the next ``num_tokens`` tokens."""
    found = ""
    while len(found) < num_tokens:
        event = await anext(stream)
        found += event["choices"][0]["text"]
    return found


async def read_all(stream: AsyncIterator[Any]) -> tuple[str, Any]:
    """All the text that is left, and the last event."""
    found, event = "", None
    async for event in stream:
        if "choices" in event:
            found += event["choices"][0]["text"]
    return found, event


@pytest.mark.parametrize("policy", ["disaggregated", "adaptive"])
def test_decode_dies_in_the_middle_and_the_stream_goes_on(policy: str) -> None:
    async def main() -> None:
        async with split(router={"policy": policy}) as (up, prefill, decode):
            decode.hold_after = 4
            stream = up.stream(PLAIN, prompt="hello", max_tokens=12)
            start = await read(stream, 4)
            await decode.kill()
            await until(lambda: bool(prefill.aborted))  # the surviving side is told
            if policy == "adaptive":
                rest, last = await read_all(stream)
                assert prefill.placed[-1].task is Task.WHOLE
            else:
                async with FakeWorker(up.net, "decode-0", Role.DECODE) as again:
                    rest, last = await read_all(stream)
                    (place,) = again.placed
                    assert (place.task, place.key.number) == (Task.DECODE, 2)
                    assert len(place.output) == 4
            assert start + rest == text(12) and last == "[DONE]"

    run(main())


def test_prefill_dies_before_the_first_token() -> None:
    async def main() -> None:
        async with split(router=DISAGGREGATED) as (up, prefill, decode):
            prefill.hold_tokens = True
            async with FakeWorker(up.net, "prefill-1", Role.PREFILL) as other:
                asked = asyncio.create_task(up.complete())
                await until(lambda: bool(prefill.placed or other.placed))
                assert prefill.placed and not other.placed
                await prefill.kill()
                status, body = await asked
                assert status == 200 and body["choices"][0]["text"] == text(8)
                assert [place.key.number for place in other.placed] == [2]
                assert [key.number for key in decode.aborted] == [1]

    run(main())


@pytest.mark.parametrize("kind", [FailureKind.PEER_LOST, FailureKind.TRANSFER, FailureKind.DROPPED])
def test_an_attempt_that_a_worker_gives_up_is_replayed(kind: FailureKind) -> None:
    async def main() -> None:
        async with split(router=DISAGGREGATED) as (up, prefill, decode):
            decode.hold_after = 3
            stream = up.stream(PLAIN, prompt="hello", max_tokens=8)
            start = await read(stream, 3)
            decode.hold_after = None
            await decode.fail(decode.placed[0].key, kind)
            rest, last = await read_all(stream)
            assert start + rest == text(8) and last == "[DONE]"
            assert [len(place.output) for place in prefill.placed] == [0, 3]

    run(main())


def test_too_large_for_a_worker_is_told_in_words() -> None:
    async def main() -> None:
        async with split() as (up, prefill, _):
            prefill.hold_tokens = True
            asked = asyncio.create_task(up.complete())
            await until(lambda: bool(prefill.placed))
            await prefill.fail(prefill.placed[0].key, FailureKind.TOO_LARGE)
            status, body = await asked
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_two_strikes_then_whole_then_an_error(stream: bool) -> None:
    """One of three workers is killed in each attempt."""

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            up = await stack.enter_async_context(router(router=DISAGGREGATED))
            workers = []
            for name, role in (("p", Role.PREFILL), ("d0", Role.DECODE), ("d1", Role.DECODE)):
                worker = FakeWorker(up.net, name, role)
                worker.hold_after = 2
                workers.append(await stack.enter_async_context(worker))
            body = {"model": MODEL, "prompt": "hello", "max_tokens": 9, "stream": stream}
            asked = asyncio.create_task(_text(up, body))
            for number in (1, 2):
                ran = await _runs(workers, number, Task.DECODE)
                assert {ran.address.worker_id} == {f"d{number - 1}"}
                ran.hold_after = 3
                await asyncio.sleep(0.05)
                await ran.kill()
            alone = await _runs(workers, 3, Task.WHOLE)
            assert alone is workers[0] and alone.placed[-1].peer is None
            await alone.kill()
            status, found = await asked
            if stream:
                assert status == 200  # the headers had left long before
                assert found[:-1] == [*text(len(found) - 1)]
                assert len(found) >= 2 and found[-1]["code"] == "workers_lost"
            else:
                assert status == 500 and found["code"] == "workers_lost"

    run(main())


async def _text(up: Router, body: dict[str, Any]) -> tuple[int, Any]:
    """The status and the error; of a stream, all its letters and then the error."""
    if not body["stream"]:
        status, answer = await up.post(PLAIN, body)
        return status, answer["error"]
    fields = {name: value for name, value in body.items() if name not in ("model", "stream")}
    found: list[Any] = []
    async for event in up.stream(PLAIN, **fields):
        found += [event["error"]] if "error" in event else event["choices"][0]["text"]
    return 200, found


async def _runs(workers: list[FakeWorker], number: int, task: Task) -> FakeWorker:
    """The worker that was given this task of that attempt."""
    found: list[FakeWorker] = []

    def given() -> bool:
        found[:] = [
            worker
            for worker in workers
            for place in worker.placed
            if (place.key.number, place.task) == (number, task)
        ]
        return bool(found)

    await until(given)
    return found[0]


def test_what_a_worker_does_not_list_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "GRACE_S", 0.4)

    async def main() -> None:
        async with (
            router(pools={"mixed": {"workers": 1}}) as up,
            FakeWorker(up.net, "mixed-0", Role.MIXED) as worker,
        ):
            worker.hold_tokens = worker.forgetful = True
            asked = asyncio.create_task(up.complete())
            await until(lambda: len(worker.placed) == 2)
            worker.forgetful = False
            worker.release()
            status, body = await asked
            assert status == 200 and body["choices"][0]["text"] == text(8)

    run(main())


def test_a_silent_worker_is_dead_and_must_rejoin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "DEAD_AFTER_S", 0.8)
    monkeypatch.setattr(fleet, "SILENT_AFTER_S", 0.4)

    async def main() -> None:
        async with split(router=DISAGGREGATED) as (up, _, decode):
            decode.hold_after = 2
            async with FakeWorker(up.net, "decode-1", Role.DECODE) as other:
                stream = up.stream(PLAIN, prompt="hello", max_tokens=6)
                start = await read(stream, 2)
                silent, speaks = (decode, other) if decode.placed else (other, decode)
                silent.silent = True
                rest, last = await read_all(stream)
                assert start + rest == text(6) and last == "[DONE]"
                assert speaks.placed[-1].key.number == 2
                silent.silent = False  # a frozen process that goes on
                await until(lambda: silent.refused is not None)
                assert silent.refused is not None and silent.refused.rejoin
                async with FakeWorker(up.net, silent.address.worker_id, Role.DECODE) as again:
                    assert again.refused is None
                    status, _ = await up.complete()
                    assert status == 200

    run(main())


def test_a_stranger_is_refused_in_words() -> None:
    async def main() -> None:
        async with (
            router() as up,
            FakeWorker(up.net, "a", Role.MIXED, fingerprint="another/fp32/16") as other,
            FakeWorker(up.net, "b", Role.MIXED, version=99) as newer,
            FakeWorker(up.net, "c", Role.MIXED) as member,
        ):
            assert other.refused is not None and "another model" in other.refused.text
            assert newer.refused is not None and "protocol 99" in newer.refused.text
            assert member.refused is None
            assert [one["id"] for one in (await up.get("/cluster"))[1]["workers"]] == ["c"]

    run(main())


def test_rubbish_on_the_control_socket_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with split() as (up, _, decode):
            for _ in range(50):
                await decode._socket.send(b"\x93rubbish")
                await decode._socket.send_multipart([b"two", b"frames"])
            assert (await up.complete())[0] == 200

    run(main())
    assert sum("dropped what a worker sent" in one.getMessage() for one in caplog.records) == 1


@pytest.mark.parametrize("stage", ["queued", "placed", "streaming"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_over_on_both_sides(
    stage: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with split(router=DISAGGREGATED) as (up, prefill, decode):
            prefill.hold_tokens = stage == "placed"
            decode.hold_after = 2
            if stage == "queued":
                await decode.kill()
                await until(lambda: up.service.not_ready is not None)
            fields = {"model": MODEL, "prompt": "hello", "max_tokens": 9, "stream": stream}
            client = asyncio.create_task(up.post(PLAIN, fields))
            await until(lambda: up.service.dispatch.num_requests == 1)
            if stage == "placed":
                await until(lambda: bool(prefill.placed and decode.placed))
            elif stage == "streaming":
                await until(lambda: bool(prefill.placed) and not prefill.live)
                await asyncio.sleep(0.05)
            client.cancel()
            await until(lambda: up.service.dispatch.num_requests == 0, limit_s=2)
            if stage == "queued":
                assert prefill.placed == []
            else:
                key = prefill.placed[0].key
                await until(lambda: prefill.aborted == decode.aborted == [key])

    with caplog.at_level(logging.INFO, "pdserve.router.app"):
        run(main())
    assert "POST /v1/completions 499 client gone;" in caplog.text


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    dumps = answer._dumps  # what buffers there are is to be full soon
    monkeypatch.setattr(answer, "_dumps", lambda body: dumps(body) + " " * 100_000)

    async def main() -> None:
        async with split(router={"write_timeout_s": 0.5}) as (up, _, decode):
            decode.hold_after = 200
            decode.token_delay = 0.002  # so that each is an event of its own
            host, port = up.url.removeprefix("http://").split(":")
            raw = socket.create_connection((host, int(port)))
            body = f'{{"model": "{MODEL}", "prompt": "x", "stream": true, "max_tokens": 250}}'
            head = f"POST {PLAIN} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall((head + body).encode())
            await until(lambda: bool(decode.aborted))
            assert up.service.dispatch.num_requests == 0
            raw.close()

    run(main())


def test_the_router_ends_what_it_does_not_know() -> None:
    async def main() -> None:
        async with split() as (up, _, decode):
            await until(lambda: decode.beaten is not None)
            decode.hold_tokens = True
            asked = asyncio.create_task(up.complete())
            await until(lambda: bool(decode.beaten and decode.beaten.live))
            assert decode.beaten is not None
            assert decode.beaten.live == (decode.placed[0].key,)
            decode.release()
            assert (await asked)[0] == 200
            await until(lambda: decode.beaten is not None and not decode.beaten.live)

    run(main())


def test_a_beat_from_nowhere_is_told_to_join() -> None:
    async def main() -> None:
        async with router() as up:
            worker = FakeWorker(up.net, "w", Role.MIXED)
            worker._socket.connect(up.net.endpoint)
            listening = asyncio.create_task(worker._listen())
            await worker.say(WorkerBeat(worker.hello.blocks, 0, 0, ()))
            await until(lambda: worker._joined.is_set())
            listening.cancel()
            await worker.kill()

    run(main())


def test_many_clients_at_once_while_workers_die() -> None:
    async def main() -> None:
        async with split(router=DISAGGREGATED) as (up, _, decode):
            decode.token_delay = 0.01
            asked = [
                asyncio.create_task(up.complete(f"prompt {index}", max_tokens=20))
                for index in range(30)
            ]
            await until(lambda: len(decode.placed) == 30)
            await asyncio.sleep(0.1)
            await decode.kill()
            async with FakeWorker(up.net, "decode-0", Role.DECODE):
                for index, (status, body) in enumerate(await asyncio.gather(*asked)):
                    assert status == 200, body
                    whole = text_of(tuple(f"prompt {index}".encode()), 20)
                    assert body["choices"][0]["text"] == whole
            assert up.service.dispatch.num_requests == 0

    run(main())


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01 what TLS would say\r\n\r\n",
        b"",
    ],
)
def test_a_client_that_speaks_no_http(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with split() as (up, _, _):
            host, port = up.url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            assert (await up.complete())[0] == 200

    run(main())
    assert "Traceback" not in caplog.text
