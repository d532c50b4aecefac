"""The bodies of /tokenize and /detokenize: a prompt's token ids, and the text of some."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import RequestError
from .body import first_fault, parse_object, well_formed
from .calls import Chat
from .messages import Messages, parse_messages

F = TypeVar("F", bound=BaseModel)


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    model: str | None = Field(None, description="the name of a model: see /v1/models")


class TokenizeFields(_Fields):
    prompt: str | None = Field(None, description="a text")
    messages: Messages = Field(None, description="a list of messages")
    add_special_tokens: bool = Field(True, description="true or false")

    @property
    def asked(self) -> str | Chat:
        return self.prompt if self.prompt is not None else Chat(parse_messages(self.messages))


class DetokenizeFields(_Fields):
    tokens: list[int] = Field(fail_fast=True, description="a list of token ids")


def parse_tokenize(data: bytes) -> TokenizeFields:
    """Raises RequestError, here or where ``asked`` is read."""
    fields = _parse(TokenizeFields, data)
    if (fields.prompt is None) == (fields.messages is None):
        raise RequestError(
            "give either a prompt or messages", param="prompt", code="missing_required_parameter"
        )
    if fields.prompt is not None:
        well_formed(fields.prompt, "prompt")
    return fields


def parse_detokenize(data: bytes) -> DetokenizeFields:
    return _parse(DetokenizeFields, data)


def _parse(model: type[F], data: bytes) -> F:
    try:
        return model.model_validate(parse_object(data))
    except ValidationError as error:
        raise first_fault(error, model) from None
