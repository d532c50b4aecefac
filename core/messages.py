"""What the router and a worker say to each other (design: the life of a request).

Sockets: the router binds one ROUTER socket, each worker connects a DEALER to it. Order
is kept between two ends, but any message may be lost with its connection: beats list
what is live, and what a beat does not list is over.

    worker -> router   Hello, WorkerBeat, Started, TokenBatch, TransferDone, AttemptFailed,
                       CacheEvents, Bye
    router -> worker   Welcome, Refused, Place, Abort, RouterBeat, SetRole, ResyncCache, Drain
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field

from .codec import Codec
from .cost import StepCost
from .ids import Attempt, Medium, Role, Task, WorkerRef
from .params import SamplingParams, TokenId

PROTOCOL_VERSION = 1
MAX_TOKENS = 1 << 21  # the longest sequence any message may speak of
MAX_LIVE = 1 << 16
MAX_LINKS = 1 << 12
HASH_BYTES = 16  # of a KV block's name
MAX_NAMES = 1 << 13  # of blocks, in one message

_STRICT = ConfigDict(extra="forbid")

Name = Annotated[str, Field(min_length=1, max_length=128)]
Endpoint = Annotated[str, Field(max_length=256)]
Sentence = Annotated[str, Field(max_length=4096)]
Epoch = Annotated[int, Field(ge=0, lt=2**63)]
Factor = Annotated[float, Field(ge=0, lt=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
ByteCount = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Tokens = Annotated[tuple[TokenId, ...], Field(max_length=MAX_TOKENS)]
RequestId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


def _whole_names(names: bytes) -> bytes:
    if len(names) % HASH_BYTES:
        raise ValueError(f"{len(names)} bytes are no names of {HASH_BYTES} bytes each")
    return names


Names = Annotated[
    bytes, Field(max_length=MAX_NAMES * HASH_BYTES), AfterValidator(_whole_names)
]  # of blocks, one after the other


@dataclass(frozen=True, slots=True)
class Key:
    """``Attempt`` as it travels."""

    __pydantic_config__ = _STRICT
    request_id: RequestId
    number: Count

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.request_id, self.number)

    @staticmethod
    def of(attempt: Attempt) -> Key:
        return Key(attempt.request_id, attempt.number)


class FinishReason(StrEnum):
    STOP = "stop"  # an end token or a stop token
    LENGTH = "length"  # max_tokens, or the end of the context


class FailureKind(StrEnum):
    """Why a worker gave up an attempt; what the router does next depends on it."""

    PEER_LOST = "peer_lost"  # the other worker vanished: replay
    TRANSFER = "transfer"  # the link between the two failed: replay elsewhere
    DROPPED = "dropped"  # this worker dropped it (drain, lease expired): replay
    TOO_LARGE = "too_large"  # it can never fit this worker: a client's error
    INTERNAL = "internal"  # a bug or a broken device


@dataclass(frozen=True, slots=True)
class TokenItem:
    """One token of one request; ``index`` is absolute in the output, from 0."""

    __pydantic_config__ = _STRICT
    key: Key
    index: Count
    token_id: TokenId
    finish: FinishReason | None = None
    logprob: float | None = None
    top: Annotated[tuple[tuple[TokenId, float], ...], Field(max_length=64)] = ()


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """``free + cached + held == total``, always."""

    __pydantic_config__ = _STRICT
    total: Count
    free: Count
    cached: Count
    held: Count


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a worker takes KV transfers. ``token`` is drawn per process: a peer shows it."""

    __pydantic_config__ = _STRICT
    worker_id: Name
    epoch: Epoch
    endpoint: Endpoint
    token: Annotated[str, Field(max_length=64)]
    public_key: Annotated[str, Field(max_length=40)] = ""  # CURVE, Z85; empty on loopback

    @property
    def ref(self) -> WorkerRef:
        return WorkerRef(self.worker_id, self.epoch)


# worker -> router


@dataclass(frozen=True, slots=True)
class Hello:
    """First words of a worker: who it is and what it can take."""

    __pydantic_config__ = _STRICT
    version: Count
    role: Role
    pid: Count
    address: PeerAddress
    fingerprint: Annotated[str, Field(max_length=128)]  # of model, dtype and block shape
    blocks: BlockCounts
    block_size: Annotated[int, Field(ge=1, le=1024)]
    max_context: Count
    max_batch: Count
    chunk_tokens: Count = 0  # the most new prompt tokens in a step of its role
    cost: StepCost | None = None  # as measured at the start


@dataclass(frozen=True, slots=True)
class PeerLink:
    """A worker that the speaker sends KV blocks to, and how."""

    __pydantic_config__ = _STRICT
    worker_id: Name
    medium: Medium


@dataclass(frozen=True, slots=True)
class Duty:
    """A worker's role as of now, and what one step of it may hold."""

    __pydantic_config__ = _STRICT
    role: Role
    chunk_tokens: Count
    max_batch: Count


@dataclass(frozen=True, slots=True)
class WorkerBeat:
    __pydantic_config__ = _STRICT
    blocks: BlockCounts
    waiting: Count
    running: Count
    live: Annotated[tuple[Key, ...], Field(max_length=MAX_LIVE)]
    links: Annotated[tuple[PeerLink, ...], Field(max_length=MAX_LINKS)] = ()
    duty: Duty | None = None
    prefill_factor: Factor = 1.0  # how many times longer than measured at the start it takes now
    decode_factor: Factor = 1.0
    beside_factor: Factor = 1.0


@dataclass(frozen=True, slots=True)
class Started:
    """A prefill has left the queue; ``num_cached_tokens`` came from the prefix cache."""

    __pydantic_config__ = _STRICT
    key: Key
    num_cached_tokens: Count


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A step's tokens for all requests of a worker.

    ``slack_ms`` is said now and then: from the end of the steps in flight to the moment by which
    the step after them must have ended (``prefill.pace``), infinite where nobody waits for that.
    """

    __pydantic_config__ = _STRICT
    items: Annotated[tuple[TokenItem, ...], Field(max_length=MAX_LIVE)]
    slack_ms: Annotated[float, Field(ge=-1e9)] | None = None


@dataclass(frozen=True, slots=True)
class TransferDone:
    """P's account of a transfer that D has whole; every time is of P's own clock.

    ``waited_s`` from the prompt's start to the grant; ``moving_s`` from the first block that
    left to D's word that all are in, the time between chunks included; ``exposed_s`` of that,
    what came after the prompt was computed. It may come after the end of its request.
    """

    __pydantic_config__ = _STRICT
    key: Key
    peer: Name
    medium: Medium
    num_bytes: ByteCount
    waited_s: Seconds
    moving_s: Seconds
    exposed_s: Seconds


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    __pydantic_config__ = _STRICT
    key: Key
    kind: FailureKind
    text: Sentence


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """The names of full KV blocks that can be found here by now, and those that no longer can.

    Numbered without a gap, from 0 in each life of the worker: whoever misses one asks for all
    (``ResyncCache``). With ``reset`` all that was said before is void.
    """

    __pydantic_config__ = _STRICT
    number: Annotated[int, Field(ge=0, lt=2**63)]
    stored: Names
    evicted: Names
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Bye:
    """The worker leaves of its own will; what it still held is dropped."""

    __pydantic_config__ = _STRICT


# router -> worker


@dataclass(frozen=True, slots=True)
class Welcome:
    """``salt`` keys the names of KV blocks; with it the worker says which of them it has."""

    __pydantic_config__ = _STRICT
    router_epoch: Epoch
    salt: Annotated[bytes, Field(max_length=64)] = b""


@dataclass(frozen=True, slots=True)
class Refused:
    """The router will not have this worker, and says why. With ``rejoin`` (it was declared
    dead) it may come back under a new epoch; without (another model) it may not."""

    __pydantic_config__ = _STRICT
    text: Sentence
    rejoin: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Run ``task`` for this attempt: the prompt, the output of earlier attempts, the sampling.

    ``peer`` is the receiving worker for PREFILL, the sending one for DECODE, absent for WHOLE.
    ``ttft_ms`` is the time that is left until the first token is due, ``tpot_ms`` what each
    later one may take; None where nothing is asked. Of the prompts that wait, those of a lower
    ``priority`` go first.
    """

    __pydantic_config__ = _STRICT
    key: Key
    task: Task
    prompt: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_TOKENS)]
    output: Tokens
    params: SamplingParams
    peer: PeerAddress | None = None
    ttft_ms: Annotated[float, Field(allow_inf_nan=False)] | None = None
    tpot_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0


@dataclass(frozen=True, slots=True)
class Abort:
    __pydantic_config__ = _STRICT
    key: Key


@dataclass(frozen=True, slots=True)
class RouterBeat:
    """Every attempt that the router believes this worker has. The worker ends the others."""

    __pydantic_config__ = _STRICT
    live: Annotated[tuple[Key, ...], Field(max_length=MAX_LIVE)]


@dataclass(frozen=True, slots=True)
class SetRole:
    """The worker is to put another phase first. It finishes the prompts, or the answers, that
    the new role has less room for, changes over, and says so in its beats."""

    __pydantic_config__ = _STRICT
    role: Role


@dataclass(frozen=True, slots=True)
class ResyncCache:
    """A message about the worker's blocks was lost: it is to name them all."""

    __pydantic_config__ = _STRICT


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what you have, say Bye, exit."""

    __pydantic_config__ = _STRICT


ToRouter: TypeAlias = (
    Hello | WorkerBeat | Started | TokenBatch | TransferDone | AttemptFailed | CacheEvents | Bye
)
ToWorker: TypeAlias = Welcome | Refused | Place | Abort | RouterBeat | SetRole | ResyncCache | Drain

TO_ROUTER: Codec[ToRouter] = Codec(
    Hello, WorkerBeat, Started, TokenBatch, TransferDone, AttemptFailed, CacheEvents, Bye
)
TO_WORKER: Codec[ToWorker] = Codec(
    Welcome, Refused, Place, Abort, RouterBeat, SetRole, ResyncCache, Drain
)
