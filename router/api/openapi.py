"""The API as an OpenAPI description, made of the very bodies that calls are checked by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .calls import ChatFields, CompletionFields
from .tokens import DetokenizeFields, TokenizeFields

Json = dict[str, Any]

_REF = "#/components/schemas/"
_BODIES: tuple[type[BaseModel], ...] = (
    ChatFields,
    CompletionFields,
    TokenizeFields,
    DetokenizeFields,
)
_REASONS = {
    400: "The call is wrong: `param` names the field",
    401: "No key, or an unknown one",
    404: "There is no such model, or no such path",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "Too much at once: `Retry-After` says when to come again",
    499: "The client has gone",
    503: "It can't be served now",
    504: "It took too long",
}
_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}


def describe(names: Sequence[str]) -> Json:
    """``names`` are the model's: the first stands in the examples."""
    _, schemas = models_json_schema(
        [(body, "validation") for body in _BODIES], ref_template=_REF + "{model}"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pdserve",
            "version": "1",  # of the paths, as in /v1
            "description": "OpenAI's API for text, and a little more.",
        },
        "paths": _paths(names[0]),
        "components": {
            "schemas": _clean(schemas["$defs"]) | _ANSWERS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _paths(name: str) -> Json:
    message = {"role": "user", "content": "Why is the sky blue?"}
    errors = (400, 401, 404, 408, 413, 429, 499, 503, 504)
    return {
        "/v1/chat/completions": {
            "post": _post(
                "Answers in a chat",
                ChatFields,
                {"model": name, "messages": [message], "max_tokens": 16},
                "ChatCompletion",
                errors,
                streams=True,
            )
        },
        "/v1/completions": {
            "post": _post(
                "Continues a text",
                CompletionFields,
                {"model": name, "prompt": "The sky is blue because", "max_tokens": 16},
                "Completion",
                errors,
                streams=True,
            )
        },
        "/tokenize": {
            "post": _post(
                "Token ids of a prompt or a chat",
                TokenizeFields,
                {"prompt": "hello"},
                "Tokens",
                (400, 401, 404, 408, 413, 429),
            )
        },
        "/detokenize": {
            "post": _post(
                "The text of token ids",
                DetokenizeFields,
                {"tokens": [1, 2]},
                "Text",
                (400, 401, 404, 408, 413, 429),
            )
        },
        "/v1/models": {"get": _get("The model, by each of its names", "Models", (401,))},
        "/v1/models/{name}": {
            "get": _get("One of them", "Model", (401, 404))
            | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]}
        },
        "/health": {"get": _get("Whether the router lives", "State", (), open_to_all=True)},
        "/ready": {
            "get": _with_state(_get("Whether it can serve", "State", (), open_to_all=True), 503)
        },
    }


def _post(
    summary: str,
    body: type[BaseModel],
    example: Json,
    answer: str,
    errors: Sequence[int],
    *,
    streams: bool = False,
) -> Json:
    content: Json = {"application/json": {"schema": _ref(answer)}}
    if streams:
        content["text/event-stream"] = {}  # its events are as OpenAI's
    json_body = {"schema": _ref(body.__name__), "example": example}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": json_body}},
        "responses": {"200": {"description": "The answer", "content": content}} | _errors(errors),
        "security": [{"key": []}, {}],
    }


def _get(summary: str, answer: str, errors: Sequence[int], *, open_to_all: bool = False) -> Json:
    content = {"application/json": {"schema": _ref(answer)}}
    return {
        "summary": summary,
        "responses": {"200": {"description": "The answer", "content": content}} | _errors(errors),
        "security": [] if open_to_all else [{"key": []}, {}],
    }


def _with_state(operation: Json, status: int) -> Json:
    content = {"application/json": {"schema": _ref("State")}}
    operation["responses"][str(status)] = {"description": "Not now", "content": content}
    return operation


def _errors(statuses: Sequence[int]) -> Json:
    content = {"application/json": {"schema": _ref("Error")}}
    return {
        str(status): {"description": _REASONS[status], "content": content} for status in statuses
    }


def _ref(name: str) -> Json:
    return {"$ref": _REF + name}


def _clean(schema: Any) -> Any:
    """Without what pydantic adds for its own use, such as a title for each field."""
    if isinstance(schema, list):
        return [_clean(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: {key: _clean(part) for key, part in found.items()}
        if name == "properties"
        else _clean(found)
        for name, found in schema.items()
        if name != "title" or not isinstance(found, str)
    }


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(of: Json) -> Json:
    return {"type": "array", "items": of}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _constant(value: str) -> Json:
    return {"type": "string", "const": value}


_USAGE = _object(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(cached_tokens=_COUNT),
)
_FINISH: Json = {"type": "string", "enum": ["stop", "length"]}
_LOGPROBS = _or_null({"type": "object"})
_MODEL = _object(
    id=_TEXT,
    object=_constant("model"),
    created=_COUNT,
    owned_by=_TEXT,
    root=_TEXT,
    max_model_len=_COUNT,
)


def _answer(kind: str, **choice: Json) -> Json:
    common = {"index": _COUNT, "logprobs": _LOGPROBS, "finish_reason": _FINISH}
    return _object(
        id=_TEXT,
        object=_constant(kind),
        created=_COUNT,
        model=_TEXT,
        choices=_list(_object(**common, **choice)),
        usage=_USAGE,
    )


_ANSWERS: Json = {
    "ChatCompletion": _answer(
        "chat.completion",
        message=_object(role=_constant("assistant"), content=_TEXT, refusal={"type": "null"}),
    ),
    "Completion": _answer("text_completion", text=_TEXT),
    "Tokens": _object(count=_COUNT, max_model_len=_COUNT, tokens=_list(_COUNT)),
    "Text": _object(prompt=_TEXT),
    "Model": _MODEL,
    "Models": _object(object=_constant("list"), data=_list(_MODEL)),
    "State": _object(status=_TEXT),
    "Error": _object(
        error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))
    ),
}
