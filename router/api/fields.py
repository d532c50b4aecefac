"""The fields that chat and plain completions share, and those that mean nothing here.

A field that asks for something this server does not do is refused by its name; the value
of it that asks for nothing is accepted. Fields that nobody knows are ignored, and listed in
the response's ``X-Ignored-Fields``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...core.errors import RequestError
from ...core.params import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams
from .body import first_fault, well_formed

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_LENGTH = 512  # characters
MIN_OBJECTIVE_MS = 0.001
MAX_OBJECTIVE_MS = 3_600_000
MAX_PRIORITY = 1000

Allowed = Mapping[str, Callable[[Any], bool]]

# What may be said of a feature that is not here: that it is not wanted.
_WITHOUT: Allowed = {
    "audio": lambda value: False,
    "best_of": lambda value: value == 1,
    "echo": lambda value: value is False,
    "function_call": lambda value: value in ("none", "auto"),
    "functions": lambda value: value == [],
    "modalities": lambda value: value == ["text"],
    "prediction": lambda value: False,
    "response_format": lambda value: value == {"type": "text"},
    "store": lambda value: value is False,
    "suffix": lambda value: value == "",
    "tool_choice": lambda value: value in ("none", "auto"),
    "tools": lambda value: value == [],
    "use_beam_search": lambda value: value is False,
    "web_search_options": lambda value: False,
}
_NO_OPS = frozenset(
    (
        *("metadata", "parallel_tool_calls", "prompt_cache_key", "reasoning_effort"),
        *("safety_identifier", "service_tier", "user", "verbosity"),
    )
)

F = TypeVar("F", bound="Fields")

# A list of a million wrong parts is refused at the first.
Texts = Annotated[list[str], Field(fail_fast=True)]
Ints = Annotated[list[int], Field(fail_fast=True)]


def _few_biases(found: Any) -> Any:
    """Before each is looked at."""
    if isinstance(found, dict) and len(found) > MAX_LOGIT_BIAS:
        raise ValueError("too many")
    return found


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool | None = None


_Milliseconds = Annotated[float, Field(ge=MIN_OBJECTIVE_MS, le=MAX_OBJECTIVE_MS)]


class SloFields(BaseModel):
    """What one request should meet; what it does not say is the deployment's."""

    model_config = ConfigDict(strict=True, frozen=True)

    ttft_ms: _Milliseconds | None = None
    tpot_ms: _Milliseconds | None = None


class Fields(BaseModel):
    """Strict: a number is no text, and true is no number."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    model: str = Field(description="the name of a model: see /v1/models")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions = Field(
        StreamOptions(), description='an object such as {"include_usage": true}'
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description=f"an integer from 1 to {MAX_CHOICES}")
    max_tokens: int | None = Field(None, ge=1, description="an integer, at least 1")
    min_tokens: int = Field(0, ge=0, description="an integer, at least 0")
    stop: str | Texts = Field(
        [], description=f"a text or a list of up to {MAX_STOPS} texts, none empty"
    )
    stop_token_ids: list[int] = Field(
        [], description=f"a list of up to {MAX_STOP_TOKENS} token ids", max_length=MAX_STOP_TOKENS
    )
    ignore_eos: bool = Field(False, description="true or false")
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, gt=0, le=1, description="a number more than 0 and up to 1")
    top_k: int = Field(0, ge=-1, lt=2**31, description="an integer, at least 1; 0 or -1 for all")
    min_p: float = Field(0.0, ge=0, le=1, description="a number from 0 to 1")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="an integer of 64 bits")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    repetition_penalty: float = Field(
        1.0, gt=0, le=100, description="a number more than 0 and up to 100"
    )
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_biases)
    ] = Field(
        {},
        max_length=MAX_LOGIT_BIAS,
        description=f"an object of up to {MAX_LOGIT_BIAS} token ids, each with a number "
        "from -100 to 100",
    )
    slo: SloFields = Field(
        SloFields(),
        description='an object such as {"ttft_ms": 500, "tpot_ms": 50}, each from '
        f"{MIN_OBJECTIVE_MS} to {MAX_OBJECTIVE_MS}",
    )
    priority: int = Field(
        0,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description=f"an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}; the lower, the earlier",
    )
    route: Literal["disaggregated", "colocated"] | None = Field(
        None, description="disaggregated or colocated"
    )

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def parse(model: type[F], body: Mapping[str, Any]) -> F:
    """The validated fields; raises RequestError, which names the field at fault."""
    for name, without in _WITHOUT.items():
        if name in body and name not in model.model_fields and not without(body[name]):
            raise RequestError(
                f"{name} is not supported here, but to say that it is not wanted",
                param=name,
                code="unsupported_parameter",
            )
    try:
        fields = model.model_validate(body)
    except ValidationError as error:
        raise first_fault(error, model) from None
    stops = fields.stops
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise _wrong(fields, "stop")
    for stop in stops:
        well_formed(stop, "stop")
    return fields


def ignored(model: type[Fields], body: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a body that nobody knows."""
    known = {*model.model_fields, *_WITHOUT, *_NO_OPS}
    return tuple(sorted(name for name in body if name not in known))


def sampling(
    fields: Fields,
    *,
    max_tokens: int,
    seed: int,
    choice: int,
    vocab_size: int,
    num_logprobs: int | None,
) -> SamplingParams:
    """Raises RequestError where token ids are not in the vocabulary."""
    if fields.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {fields.min_tokens}; the answer may have up to {max_tokens}",
            param="min_tokens",
            code="invalid_value",
        )
    if not all(0 <= token_id < vocab_size for token_id in fields.stop_token_ids):
        raise _wrong(fields, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=fields.temperature,
        top_k=max(0, fields.top_k),
        top_p=fields.top_p,
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        seed=seed,
        choice=choice,
        min_tokens=fields.min_tokens,
        stop_token_ids=tuple(fields.stop_token_ids),
        ignore_eos=fields.ignore_eos,
        logit_bias=tuple(_logit_bias(fields, vocab_size)),
        logprobs=num_logprobs,
    )


def _logit_bias(fields: Fields, vocab_size: int) -> Iterable[tuple[int, float]]:
    for name, bias in fields.logit_bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise _wrong(fields, "logit_bias")
        yield int(name), float(bias)


def _wrong(fields: Fields, name: str) -> RequestError:
    description = type(fields).model_fields[name].description
    return RequestError(f"{name} must be {description}", param=name, code="invalid_value")
