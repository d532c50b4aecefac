"""One REST call, parsed: what is to be generated, and in which form it is wanted.

A call has one or more prompts, and ``n`` choices for each; choice ``i`` of prompt ``p`` is
number ``p * n + i`` of the answer. Every choice is a request of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from pydantic import Field

from ...core.config import Policy
from ...core.errors import RequestError
from ...core.params import MAX_LOGPROBS, SamplingParams
from .body import parse_object, well_formed
from .fields import Fields, Ints, Texts, ignored, parse, sampling
from .messages import Messages, parse_messages

MAX_CALL_CHOICES = 128
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

TokenIds: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages, each with role and content."""

    messages: tuple[dict[str, str], ...]


Prompt: TypeAlias = Chat | str | TokenIds


class ChatFields(Fields):
    messages: Messages = Field(description="a list of messages")
    max_completion_tokens: int | None = Field(None, ge=1, description="an integer, at least 1")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = Field(
        0, ge=0, le=MAX_LOGPROBS, description=f"an integer from 0 to {MAX_LOGPROBS}"
    )


class CompletionFields(Fields):
    prompt: str | Texts | Ints | Annotated[list[Ints], Field(fail_fast=True)] = Field(
        description="a text, a list of token ids, or a list of such prompts; none empty"
    )
    echo: bool = Field(False, description="true or false")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"an integer from 0 to {MAX_LOGPROBS}"
    )


@dataclass(frozen=True, slots=True)
class Call:
    """``limit_field`` is the one of max_tokens' two names that the client used."""

    prompts: tuple[Prompt, ...]
    fields: Fields
    max_tokens: int | None  # None: ``default_tokens``, or what the context has room for
    limit_field: str
    num_logprobs: int | None
    ignored: tuple[str, ...]
    default_tokens: int | None = None

    @property
    def chat(self) -> bool:
        return isinstance(self.fields, ChatFields)

    @property
    def prompt_field(self) -> str:
        return "messages" if self.chat else "prompt"

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.fields.n

    @property
    def include_usage(self) -> bool:
        return self.fields.stream and bool(self.fields.stream_options.include_usage)

    @property
    def echo(self) -> bool:
        return isinstance(self.fields, CompletionFields) and self.fields.echo

    @property
    def route(self) -> Policy | None:
        return Policy(self.fields.route) if self.fields.route is not None else None

    def params(
        self, prompt: TokenIds, *, choice: int, seed: int, max_context: int, vocab_size: int
    ) -> SamplingParams:
        """Raises RequestError where prompt and answer do not fit the context."""
        if not prompt:
            raise RequestError("the prompt is empty", param=self.prompt_field, code="invalid_value")
        room = max_context - len(prompt)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; this deployment takes up to "
                f"{max_context - 1}, and one for the answer",
                param=self.prompt_field,
                code="context_length_exceeded",
            )
        if not all(0 <= token_id < vocab_size for token_id in prompt):
            raise RequestError(
                f"{self.prompt_field} has a token id that is not in the vocabulary: "
                f"0 to {vocab_size - 1}",
                param=self.prompt_field,
                code="invalid_value",
            )
        max_tokens = self.max_tokens or min(room, self.default_tokens or room)
        if max_tokens > room:
            raise RequestError(
                f"{self.limit_field} is {max_tokens}; beside a prompt of {len(prompt)} tokens "
                f"there is room for {room}, in a context of {max_context}",
                param=self.limit_field,
                code="context_length_exceeded",
            )
        return sampling(
            self.fields,
            max_tokens=max_tokens,
            seed=seed,
            choice=choice,
            vocab_size=vocab_size,
            num_logprobs=self.num_logprobs,
        )


def parse_chat(data: bytes) -> Call:
    body = parse_object(data)
    fields = parse(ChatFields, body)
    messages = parse_messages(fields.messages)
    if fields.top_logprobs and not fields.logprobs:
        raise RequestError(
            "top_logprobs wants logprobs to be true", param="top_logprobs", code="invalid_value"
        )
    newer = fields.max_completion_tokens is not None
    return Call(
        prompts=(Chat(messages),),
        fields=fields,
        max_tokens=fields.max_completion_tokens if newer else fields.max_tokens,
        limit_field="max_completion_tokens" if newer else "max_tokens",
        num_logprobs=fields.top_logprobs if fields.logprobs else None,
        ignored=ignored(ChatFields, body),
    )


def parse_completion(data: bytes) -> Call:
    body = parse_object(data)
    if body.get("logprobs") is False:  # some clients say it as for chat
        del body["logprobs"]
    fields = parse(CompletionFields, body)
    if fields.echo and fields.logprobs is not None:
        raise RequestError(
            "echo can't be had together with logprobs: those of a prompt are not computed here",
            param="echo",
            code="unsupported_parameter",
        )
    prompts = _prompts(fields.prompt)
    if not prompts or not all(prompts) or len(prompts) * fields.n > MAX_CALL_CHOICES:
        raise RequestError(
            f"prompt must be one or more prompts, none empty, for up to {MAX_CALL_CHOICES} "
            "choices in all",
            param="prompt",
            code="invalid_value",
        )
    return Call(
        prompts=prompts,
        fields=fields,
        max_tokens=fields.max_tokens,
        limit_field="max_tokens",
        num_logprobs=fields.logprobs,
        ignored=ignored(CompletionFields, body),
        default_tokens=DEFAULT_COMPLETION_TOKENS,
    )


def _prompts(found: str | list[str] | list[int] | list[list[int]]) -> tuple[Prompt, ...]:
    if isinstance(found, str):
        return (well_formed(found, "prompt"),)
    prompts: list[Prompt] = []
    token_ids: list[int] = []
    for part in found:
        match part:
            case str(text):
                prompts.append(well_formed(text, "prompt"))
            case int(token_id):
                token_ids.append(token_id)
            case list(ids):
                prompts.append(tuple(ids))
    return (tuple(token_ids),) if token_ids else tuple(prompts)
