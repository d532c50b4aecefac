"""Names of the things that live longer than one message."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """A worker's budget between the two phases; every worker can do both."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Task(StrEnum):
    """What one worker is asked to do for one attempt of a request."""

    PREFILL = "prefill"  # read the prompt, sample token 0, hand the KV cache to a peer
    DECODE = "decode"  # take the KV cache from a peer, write the answer
    WHOLE = "whole"  # both, on this worker, with no transfer


class Medium(StrEnum):
    """How KV blocks cross from one worker to another."""

    CUDA_IPC = "cuda_ipc"  # D maps P's pool, on a GPU of the same host, and pulls
    SHM = "shm"  # D copies out of P's pool, which lies in shared memory
    TCP = "tcp"  # frames over a socket
    INPROC = "inproc"  # frames within one process


@dataclass(frozen=True, slots=True, order=True)
class Attempt:
    """One try at one request. A newer number ends the older one on the same worker."""

    request_id: str
    number: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.number}"


@dataclass(frozen=True, slots=True)
class WorkerRef:
    """One life of one worker: a restarted process is another epoch, so another worker."""

    worker_id: str
    epoch: int

    def __str__(self) -> str:
        return f"{self.worker_id}@{self.epoch:x}"


def new_request_id() -> str:
    """A name nobody can guess: knowing it is what lets a peer write into a transfer."""
    return secrets.token_hex(16)


def new_epoch() -> int:
    """Drawn at the start of each process; 63 bits, so that msgpack keeps it an int."""
    return secrets.randbits(63)
