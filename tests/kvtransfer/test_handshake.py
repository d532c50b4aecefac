"""Two ends that differ are told in what; a stranger is told nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from kv_parts import ADDRESS, D, P, handshake, nothing_works

from pdserve.core.ids import Medium
from pdserve.core.messages import MAX_LIVE, Key
from pdserve.core.plan import PoolExport
from pdserve.kvtransfer.messages import MAX_CHUNK_BLOCKS, TO_RECEIVER, Accepted, Rejected
from pdserve.kvtransfer.settings import TransferSettings, beats

TCP, SHM, IPC = Medium.TCP, Medium.SHM, Medium.CUDA_IPC
OURS = handshake(D, ADDRESS.token)
CONNECT = handshake(P, "secret-of-p").connect(ADDRESS)


def test_equals_are_accepted() -> None:
    assert OURS.answer(CONNECT, nothing_works) == Accepted(D.worker_id, D.epoch, Medium.TCP)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("version", 2, "protocol version is 2 there and 1 here"),
        ("fingerprint", "model-2", "model fingerprint is model-2 there and model-1 here"),
        ("num_layers", 9, "number of layers"),
        ("num_kv_heads", 9, "number of KV heads"),
        ("block_size", 9, "block size"),
        ("head_dim", 9, "head dimension"),
        ("dtype", "bf16", "dtype is bf16 there and uint8 here"),
        ("block_bytes", 9, "block bytes"),
    ],
)
def test_a_difference_is_named(field: str, value: object, said: str) -> None:
    answer = OURS.answer(replace(CONNECT, **{field: value}), nothing_works)  # type: ignore[arg-type]
    assert isinstance(answer, Rejected) and said in answer.text


def test_the_fastest_that_both_have_and_that_works_is_taken() -> None:
    exports = tuple(PoolExport(medium, "name", bytes(16), 8) for medium in (IPC, SHM))
    connect = handshake(P, "s", media=(IPC, SHM, TCP), exports=exports).connect(ADDRESS)
    tried: list[Medium] = []

    def proves(*working: Medium) -> Callable[[PoolExport], str | None]:
        tried.clear()

        def prove(export: PoolExport) -> str | None:
            tried.append(export.medium)
            return None if export.medium in working else f"no {export.medium} here"

        return prove

    every = handshake(D, ADDRESS.token, media=(IPC, SHM, TCP))
    for working, taken in (((IPC, SHM), IPC), ((SHM,), SHM), ((), TCP)):
        answer = every.answer(connect, proves(*working))
        assert answer == Accepted(D.worker_id, D.epoch, taken)
    assert tried == [IPC, SHM]
    only = handshake(D, ADDRESS.token, media=(SHM,))
    assert only.answer(connect, proves(IPC, SHM)) == Accepted(D.worker_id, D.epoch, SHM)
    assert tried == [SHM]
    refused = only.answer(connect, proves())
    assert isinstance(refused, Rejected) and "shm: no shm here" in refused.text
    nothing_shown = only.answer(replace(connect, exports=()), proves(SHM))
    assert isinstance(nothing_shown, Rejected)
    assert "media there: cuda_ipc, shm, tcp; here: shm" in nothing_shown.text


def test_a_wrong_token_learns_nothing() -> None:
    answer = OURS.answer(replace(CONNECT, token="guess", fingerprint="model-2"), nothing_works)
    assert isinstance(answer, Rejected)
    assert "model" not in answer.text and D.worker_id not in answer.text
    assert ADDRESS.token not in answer.text


def test_sizes_follow_from_bytes() -> None:
    settings = TransferSettings(block_size=16, block_bytes=2 << 20)
    assert (settings.chunk_blocks(TCP), settings.window_blocks(TCP)) == (2, 16)
    small = TransferSettings(block_size=16, block_bytes=64, window_bytes=1 << 30)
    assert small.chunk_blocks(TCP) <= MAX_CHUNK_BLOCKS
    huge = TransferSettings(block_size=16, block_bytes=1 << 30)
    assert (huge.chunk_blocks(TCP), huge.window_blocks(TCP)) == (1, 1)
    assert settings.tombstone_s > settings.lease_s > settings.parking_s > settings.beat_s
    assert (settings.num_blocks(16), settings.num_blocks(17)) == (1, 2)


def test_many_transfers_take_several_beats_each_within_bounds() -> None:
    keys = [Key("0" * 32, number) for number in range(MAX_LIVE + 5)]
    said = list(beats(keys))
    assert [len(beat.live) for beat in said] == [MAX_LIVE, 5]
    assert TO_RECEIVER.decode(TO_RECEIVER.encode(said[0])) == said[0]
    assert list(beats([])) == []
