"""One deployment as one YAML file: frozen, validated once, each default stated here.

``load`` raises ConfigError with one sentence: the file, the key's path, what was found,
what is allowed; an unknown key suggests the nearest known one.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError


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
    ADAPTIVE = "adaptive"  # the router's choice; until its forecasts exist: split where there are two pools
    DISAGGREGATED = "disaggregated"
    COLOCATED = "colocated"


class Admission(StrEnum):
    QUEUE = "queue"
    OPEN = "open"


class Medium(StrEnum):
    AUTO = "auto"
    TCP = "tcp"
    INPROC = "inproc"


class Switch(StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


_SIZE_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]


class ModelSection(_Section):
    path: Annotated[str, Field(min_length=1)]  # a folder, a .gguf file, or a known name
    name: str | None = None  # what /v1/models calls it; default: the last part of the path
    dtype: Dtype = Dtype.AUTO
    load: Load = Load.AUTO
    max_context: Positive | Auto = "auto"  # auto: the model's own


class PoolSection(_Section):
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    chunk_tokens: Positive | Auto = "auto"  # new prompt tokens a step
    max_batch: Positive | Auto = "auto"  # sequences decoding at once


class PoolsSection(_Section):
    prefill: PoolSection = PoolSection()
    decode: PoolSection = PoolSection()
    mixed: PoolSection = PoolSection()


class KvSection(_Section):
    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    # a fraction of the device's free memory (0.85), or a size ("2GiB"), for each device
    memory: Annotated[float, Field(gt=0, le=1)] | str = "auto"
    prefix_cache: bool = True

    @model_validator(mode="after")
    def _memory_is_a_size(self) -> KvSection:
        if isinstance(self.memory, str) and self.memory != "auto":
            parse_size(self.memory)
        return self


class TransferSection(_Section):
    medium: Medium = Medium.AUTO
    checksums: Switch = Switch.AUTO  # auto: on over tcp
    lease_s: Annotated[float, Field(gt=0)] = 10.0  # unheard of for so long, a transfer is over


class SloSection(_Section):
    ttft_ms: Milliseconds = 500.0
    tpot_ms: Milliseconds = 50.0


class RouterSection(_Section):
    host: str = "127.0.0.1"
    port: Port = 8000
    control: str | None = None  # "tcp://HOST:PORT" lets workers of other hosts join
    policy: Policy = Policy.ADAPTIVE
    admission: Admission = Admission.QUEUE
    max_queue: Positive = 1024  # requests in the house; the next one gets 429
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0


class SecuritySection(_Section):
    keys: str | None = None  # the folder that `pdserve keys new` made
    insecure: bool = False  # bind off loopback without keys


class EngineKind(StrEnum):
    AUTO = "auto"
    TORCH = "torch"
    SIMULATED = "simulated"


class Deployment(_Section):
    """The file as a whole."""

    model: ModelSection
    pools: PoolsSection = PoolsSection(prefill=PoolSection(workers=1), decode=PoolSection(workers=1))
    kv: KvSection = KvSection()
    kv_transfer: TransferSection = TransferSection()
    slo: SloSection = SloSection()
    router: RouterSection = RouterSection()
    security: SecuritySection = SecuritySection()
    engine: EngineKind = EngineKind.AUTO
    launcher: Literal["local"] = "local"

    @model_validator(mode="after")
    def _pools_fit_the_policy(self) -> Deployment:
        pools, policy = self.pools, self.router.policy
        if policy is Policy.DISAGGREGATED and not (
            (pools.prefill.workers or pools.mixed.workers)
            and (pools.decode.workers or pools.mixed.workers)
            and pools.prefill.workers + pools.decode.workers + pools.mixed.workers >= 2
        ):
            raise ValueError(
                "policy disaggregated needs a worker to prefill and another to decode "
                "(pools.prefill.workers and pools.decode.workers at least 1)"
            )
        return self


def parse_size(text: str) -> int:
    """``"512MiB"`` in bytes; ValueError with the allowed forms."""
    for unit, factor in _SIZE_UNITS.items():
        if text.endswith(unit):
            try:
                number = float(text[: -len(unit)])
            except ValueError:
                break
            if number > 0:
                return int(number * factor)
    raise ValueError("a fraction such as 0.85, a size such as 512MiB or 2GiB, or auto")


def load(path: Path, overrides: Sequence[str] = ()) -> Deployment:
    """Reads and validates a deployment file; ``overrides`` are ``a.b=value`` (YAML values)."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_fault(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {_shown(data)}, a deployment is a mapping of sections")
    for override in overrides:
        _apply(data, override)
    try:
        return Deployment.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_fault(error, data)}") from None


def _yaml_fault(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _apply(data: dict[str, Any], override: str) -> None:
    """Sets one ``a.b=value`` in the parsed file."""
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override}: found no key=value, write for example --set router.port=8080")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: not valid YAML: {_yaml_fault(error)}") from error
    node = data
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {part} is {_shown(child)}, not a section")
        node = child
    node[parts[-1]] = value


def _first_fault(error: ValidationError, data: Mapping[str, Any]) -> str:
    """One sentence for the first fault: path, found, allowed."""
    faults = error.errors(include_url=False)
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    path = tuple(str(part) for part in fault["loc"])
    known, path = _known_path(path)
    where = ".".join(path)
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        section = ".".join(path[:-1]) or "the file"
        hint = f"did you mean {near[0]}?" if near else f"{section} knows {', '.join(sorted(known))}"
        return f"{where}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{where}: missing; it has no default"
    same = [f for f in faults if _known_path(tuple(str(p) for p in f["loc"]))[1] == path]
    allowed = " or ".join(dict.fromkeys(_allowed(f) for f in same))
    if not where:
        return allowed
    return f"{where}: found {_shown(fault['input'])}; allowed: {allowed}"


def _allowed(fault: Any) -> str:
    message = str(fault["msg"])
    for prefix in ("Input should be ", "Value error, ", "String should "):
        message = message.removeprefix(prefix)
    return message


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_path(path: tuple[str, ...]) -> tuple[list[str], tuple[str, ...]]:
    """The keys of the section that ``path`` ends in, and the path without pydantic's union tags."""
    section: type[BaseModel] = Deployment
    for depth, part in enumerate(path):
        field = section.model_fields.get(part)
        if field is None:
            return list(section.model_fields), path[: depth + 1]
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
        else:
            assert annotation is None or not isinstance(annotation, types.NoneType)
            return list(section.model_fields), path[: depth + 1]
    return list(section.model_fields), path
