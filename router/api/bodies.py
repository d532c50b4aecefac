"""What an answer looks like: OpenAI's objects for chat and for plain completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...core.messages import FinishReason, TokenItem

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity

Json = dict[str, Any]


class Vocabulary(Protocol):
    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass(slots=True)
class Choice:
    """One choice as it grows. ``logprobs`` are of all its tokens, None where not asked for."""

    index: int
    text: str = ""
    finish: FinishReason | None = None
    logprobs: Json | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int

    def body(self) -> Json:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


class Bodies(Protocol):
    """The objects of one answer. A chunk carries what is new of one choice."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Json: ...

    def chunks(self, choice: Choice, *, first: bool) -> list[Json]: ...

    def usage_chunk(self, usage: Usage) -> Json: ...

    def timeline_chunk(self, timelines: list[Json]) -> Json: ...

    def logprobs(self, items: Sequence[TokenItem], offset: int) -> tuple[Json, int]:
        """Of these tokens, the first of which begins at character ``offset``; and the next."""
        ...


@dataclass(frozen=True, slots=True)
class _Common:
    call_id: str
    model: str
    vocabulary: Vocabulary
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def _body(self, kind: str, name: str, choices: list[Json], usage: Usage | None) -> Json:
        return {
            "id": f"{name}-{self.call_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        } | ({"usage": usage.body()} if usage is not None else {})

    def _chunk(self, kind: str, name: str, choices: list[Json], usage: Usage | None = None) -> Json:
        body = self._body(kind, name, choices, usage)
        return body | {"usage": None} if self.include_usage and usage is None else body


class ChatBodies(_Common):
    __slots__ = ()

    _NAME = "chatcmpl"
    _CHUNK = "chat.completion.chunk"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Json:
        bodies = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish,
            }
            for choice in choices
        ]
        return self._body("chat.completion", self._NAME, bodies, usage)

    def chunks(self, choice: Choice, *, first: bool) -> list[Json]:
        chunks = []
        if first:
            chunks.append(self._delta(choice.index, {"role": "assistant", "content": ""}))
        if choice.text or choice.logprobs:
            delta = {"content": choice.text}
            chunks.append(self._delta(choice.index, delta, logprobs=choice.logprobs))
        if choice.finish is not None:
            chunks.append(self._delta(choice.index, {}, finish=choice.finish))
        return chunks

    def usage_chunk(self, usage: Usage) -> Json:
        return self._chunk(self._CHUNK, self._NAME, [], usage)

    def timeline_chunk(self, timelines: list[Json]) -> Json:
        return self._chunk(self._CHUNK, self._NAME, []) | {"timelines": timelines}

    def logprobs(self, items: Sequence[TokenItem], offset: int) -> tuple[Json, int]:
        content = [
            self._token(item.token_id, item.logprob)
            | {"top_logprobs": [self._token(*one) for one in item.top]}
            for item in items
        ]
        return {"content": content, "refusal": None}, offset

    def _delta(
        self,
        index: int,
        delta: Json,
        logprobs: Json | None = None,
        finish: FinishReason | None = None,
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._chunk(self._CHUNK, self._NAME, [choice])

    def _token(self, token_id: int, logprob: float | None) -> Json:
        return {
            "token": self.vocabulary.token_text(token_id),
            "logprob": _shown(logprob),
            "bytes": list(self.vocabulary.token_bytes(token_id)),
        }


class CompletionBodies(_Common):
    __slots__ = ()

    _NAME = "cmpl"
    _KIND = "text_completion"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Json:
        return self._body(self._KIND, self._NAME, [self._choice(one) for one in choices], usage)

    def chunks(self, choice: Choice, *, first: bool) -> list[Json]:
        if not (choice.text or choice.logprobs or choice.finish):
            return []
        return [self._chunk(self._KIND, self._NAME, [self._choice(choice)])]

    def usage_chunk(self, usage: Usage) -> Json:
        return self._chunk(self._KIND, self._NAME, [], usage)

    def timeline_chunk(self, timelines: list[Json]) -> Json:
        return self._chunk(self._KIND, self._NAME, []) | {"timelines": timelines}

    def logprobs(self, items: Sequence[TokenItem], offset: int) -> tuple[Json, int]:
        texts = [self.vocabulary.token_text(item.token_id) for item in items]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        logprobs = {
            "tokens": texts,
            "token_logprobs": [_shown(item.logprob) for item in items],
            "top_logprobs": [
                {self.vocabulary.token_text(token_id): _shown(lp) for token_id, lp in item.top}
                for item in items
            ],
            "text_offset": offsets,
        }
        return logprobs, offset

    def _choice(self, choice: Choice) -> Json:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish,
        }


def _shown(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST_LOGPROB)
