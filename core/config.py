"""One deployment as one YAML file: frozen, validated once, each default stated here.

``load`` raises ConfigError with one sentence: the file, the key's path, what was found,
what is allowed; an unknown key suggests the nearest known one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .config_faults import first_fault, shown, yaml_fault
from .errors import ConfigError
from .files import reason, write_whole
from .ids import Medium


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dtype(StrEnum):
    AUTO = "auto"  # bf16 on a GPU, fp32 on a CPU
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Load(StrEnum):
    AUTO = "auto"  # what the path holds
    SAFETENSORS = "safetensors"
    GGUF = "gguf"
    DUMMY = "dummy"  # random weights, for speed tests


class Policy(StrEnum):
    ADAPTIVE = "adaptive"  # by forecast, request by request
    DISAGGREGATED = "disaggregated"
    COLOCATED = "colocated"


class Admission(StrEnum):
    SLO = "slo"
    QUEUE = "queue"
    OPEN = "open"


class Switch(StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


_SIZE_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_size(text: str) -> int:
    """``"512MiB"`` in bytes; ValueError for anything else."""
    for unit, factor in _SIZE_UNITS.items():
        if text.endswith(unit):
            number = float(text.removesuffix(unit))
            if 0 < number < 1 << 20:
                return int(number * factor)
    raise ValueError(f"not a size: {text}")


def _size(text: str) -> str:
    parse_size(text)
    return text


# A description is what an error message says is allowed.
Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1, strict=True, description="an integer, at least 1")]
PositiveOrAuto = Annotated[
    Annotated[int, Field(ge=1, strict=True)] | Auto,
    Field(description="an integer, at least 1, or auto"),
]
Milliseconds = Annotated[
    float,
    Field(gt=0, strict=True, allow_inf_nan=False, description="milliseconds, more than 0"),
]
AnyMilliseconds = Annotated[
    float,
    Field(ge=0, strict=True, allow_inf_nan=False, description="milliseconds, 0 or more"),
]
Seconds = Annotated[
    float, Field(gt=0, strict=True, allow_inf_nan=False, description="seconds, more than 0")
]
Share = Annotated[
    float, Field(ge=0, le=1, strict=True, allow_inf_nan=False, description="a share from 0 to 1")
]
Port = Annotated[
    int,
    Field(ge=0, le=65535, strict=True, description="a port from 0 to 65535 (0: any free one)"),
]
Workers = Annotated[int, Field(ge=0, le=1024, strict=True, description="an integer from 0 to 1024")]
Streams = Annotated[int, Field(ge=1, le=16, strict=True, description="an integer from 1 to 16")]
BlockSize = Annotated[int, Field(ge=1, le=256, strict=True, description="an integer from 1 to 256")]
Flag = Annotated[bool, Field(strict=True, description="true or false")]
Text = Annotated[str, Field(min_length=1, description="a text")]
Names = Annotated[tuple[Text, ...], Field(max_length=64, description="a list of names")]
Device = Annotated[
    str,
    Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, or one GPU: cuda:0"),
]
Memory = Annotated[
    Annotated[float, Field(gt=0, le=1, strict=True)] | Auto | Annotated[str, AfterValidator(_size)],
    Field(description="a fraction such as 0.85, a size such as 512MiB or 2GiB, or auto"),
]
Body = Annotated[
    Auto | Annotated[str, AfterValidator(_size)],
    Field(description="a size such as 512KiB or 8MiB, or auto"),
]
ControlEndpoint = Annotated[
    str,
    Field(
        pattern=r"^tcp://(\[[0-9A-Fa-f:]+\]|[^\s:/]+):\d{1,5}$",
        description="an address such as tcp://192.168.1.10:8100",
    ),
]


Url = Annotated[
    str,
    Field(pattern=r"^https?://[^\s/]+(/\S*)?$", description="a URL such as http://host:4318/path"),
]


class ModelSection(_Section):
    path: Text  # a folder, a .gguf file, or a known name
    name: Text | None = None  # what /v1/models calls it; default: the last part of the path
    aliases: Names = ()  # other names that a request may call it by
    dtype: Dtype = Dtype.AUTO
    load: Load = Load.AUTO
    max_context: PositiveOrAuto = "auto"  # auto: the model's own


class PoolSection(_Section):
    workers: Workers = 0
    device: Device = "auto"
    chunk_tokens: PositiveOrAuto = "auto"  # new prompt tokens a step
    max_batch: PositiveOrAuto = "auto"  # sequences decoding at once


class PoolsSection(_Section):
    prefill: PoolSection = PoolSection()
    decode: PoolSection = PoolSection()
    mixed: PoolSection = PoolSection()

    @property
    def num_workers(self) -> int:
        return self.prefill.workers + self.decode.workers + self.mixed.workers


class KvSection(_Section):
    block_size: BlockSize = 16
    memory: Memory = "auto"  # a fraction of each device (what weights leave of it), or a size
    prefix_cache: Flag = True


def _between_processes(medium: Medium | Auto) -> Medium | Auto:
    if medium is Medium.INPROC:
        raise ValueError("workers are processes of their own")
    return medium


class TransferSection(_Section):
    # auto: the fastest that works between two workers
    medium: Annotated[
        Medium | Auto,
        AfterValidator(_between_processes),
        Field(description="auto, cuda_ipc, shm or tcp (inproc is for workers of one process)"),
    ] = "auto"
    checksums: Switch = Switch.AUTO  # auto: on over tcp
    streams: Streams = 1  # sockets side by side between two workers, for tcp
    # this host's address for peers; auto: loopback, or the one that the router is reached from
    host: Text = "auto"
    lease_s: Seconds = 10.0  # unheard of for so long, a transfer is over

    @property
    def window_bytes(self) -> int:
        """By value, on its way to one peer and not acknowledged."""
        return (32 << 20) * (1 + self.streams)

    @property
    def chunk_bytes(self) -> int:
        """By value, in one message. The less it is, the sooner its first byte is hashed, sent and
        written; the more, the fewer turns of the one thread that feeds all streams."""
        return (8 if self.streams > 1 else 4) << 20


class SloSection(_Section):
    ttft_ms: Milliseconds = 500.0
    tpot_ms: Milliseconds = 50.0


class RouterSection(_Section):
    host: Text = "127.0.0.1"
    port: Port = 8000
    control: ControlEndpoint | None = None  # where workers of other hosts join
    policy: Policy = Policy.ADAPTIVE
    admission: Admission = Admission.QUEUE
    plan_roles: Flag = False  # move workers between roles as the load asks
    max_queue: Positive = 1024  # requests in the house; the next one gets 429
    request_timeout_s: Seconds = 600.0
    max_body: Body = "auto"  # auto: 32 bytes for each token of the context, at least 4 MiB
    max_connections: Positive = 4096
    header_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 60.0
    idle_timeout_s: Seconds = 75.0
    write_timeout_s: Seconds = 30.0


class SecuritySection(_Section):
    keys: Text | None = None  # the folder that `pdserve keys new` made
    insecure: Flag = False  # bind off loopback without keys
    api_keys: Text | None = None  # the file that `pdserve keys api` made
    tls_cert: Text | None = None  # a PEM file, with the chain
    tls_key: Text | None = None  # a PEM file


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class ObservabilitySection(_Section):
    log_format: LogFormat = LogFormat.TEXT
    log_prompts: Flag = False  # the text of prompts in the log, too
    otlp_endpoint: Url | None = None  # where spans go: http://HOST:4318/v1/traces


class SimulationSection(_Section):
    """What a step of the simulated engine takes, beside what its hashes do."""

    step_ms: AnyMilliseconds = 0.0
    token_ms: AnyMilliseconds = 0.0  # for each token that it computes


class DisturbanceSection(_Section):
    """What is done on purpose to messages of a kind, as shares of them."""

    drop: Share = 0.0
    duplicate: Share = 0.0
    delay: Share = 0.0
    delay_ms: Milliseconds = 100.0  # at the most

    @property
    def any(self) -> bool:
        return bool(self.drop or self.duplicate or self.delay)


class BlocksDisturbanceSection(DisturbanceSection):
    damage: Share = 0.0  # of chunks, where they have checksums

    @property
    def any(self) -> bool:
        return bool(self.damage) or super().any


class FaultsSection(_Section):
    """Off, unless a test wants to see what a bad network does."""

    seed: Annotated[int, Field(strict=True, ge=0, description="an integer, 0 or more")] = 0
    kv: BlocksDisturbanceSection = BlocksDisturbanceSection()
    control: DisturbanceSection = DisturbanceSection()

    @property
    def any(self) -> bool:
        return self.kv.any or self.control.any


class EngineKind(StrEnum):
    AUTO = "auto"
    TORCH = "torch"
    SIMULATED = "simulated"


class Deployment(_Section):
    """The file as a whole. Without ``pools`` it is one prefill and one decode worker; where
    ``pools`` is given, it lists all there are."""

    model: ModelSection
    pools: PoolsSection = PoolsSection(
        prefill=PoolSection(workers=1), decode=PoolSection(workers=1)
    )
    kv: KvSection = KvSection()
    kv_transfer: TransferSection = TransferSection()
    slo: SloSection = SloSection()
    router: RouterSection = RouterSection()
    security: SecuritySection = SecuritySection()
    observability: ObservabilitySection = ObservabilitySection()
    simulation: SimulationSection = SimulationSection()
    faults: FaultsSection = FaultsSection()
    engine: EngineKind = EngineKind.AUTO
    launcher: Literal["local"] = "local"

    @model_validator(mode="after")
    def _has_workers(self) -> Deployment:
        if (self.security.tls_cert is None) != (self.security.tls_key is None):
            raise ValueError("security.tls_cert and security.tls_key: give both, or neither")
        if self.faults.kv.damage and self.kv_transfer.checksums is Switch.OFF:
            raise ValueError(
                "faults.kv.damage: nothing would notice it; it needs kv_transfer.checksums"
            )
        pools = self.pools
        if self.router.control is not None:
            return self  # workers of other hosts count too
        if pools.num_workers == 0:
            raise ValueError(
                "pools: no workers; give pools.prefill.workers and pools.decode.workers "
                "(or pools.mixed.workers) at least 1, or router.control for workers to join"
            )
        if self.router.policy is Policy.DISAGGREGATED and not (
            pools.prefill.workers + pools.mixed.workers
            and pools.decode.workers + pools.mixed.workers
            and pools.num_workers >= 2
        ):
            raise ValueError(
                "router.policy: disaggregated needs a worker to prefill and another to decode; "
                "give pools.prefill.workers and pools.decode.workers at least 1"
            )
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Deployment:
    """Reads and validates a deployment file; ``overrides`` are ``a.b=value`` (YAML values)."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from error
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise ConfigError(f"{path}: {yaml_fault(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {shown(data)}; allowed: a mapping of sections")
    for override in overrides:
        _apply(data, override)
    try:
        return Deployment.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_fault(Deployment, error, data)}") from None


def save(deployment: Deployment, path: Path) -> None:
    """Writes every value, defaults resolved, as JSON: a form of YAML that ``load`` reads.

    StartupError where it can't be written.
    """
    write_whole(path, deployment.model_dump_json(indent=2).encode() + b"\n")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, where YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused by the superclass
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _apply(data: dict[str, Any], override: str) -> None:
    """Sets one ``a.b=value`` in the parsed file, and nothing beside it."""
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(
            f"--set {override}: found no key=value; allowed: for example --set router.port=8080"
        )
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override}: {yaml_fault(error)}") from error
    if parts[0] == "pools" and len(parts) > 1 and "pools" not in data:
        data["pools"] = {"prefill": {"workers": 1}, "decode": {"workers": 1}}  # the default
    node = data
    for depth, part in enumerate(parts[:-1]):
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            section = ".".join(parts[: depth + 1])
            raise ConfigError(f"--set {override}: {section} is {shown(child)}, not a section")
        node = child
    node[parts[-1]] = value
