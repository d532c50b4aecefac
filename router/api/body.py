"""A request's body as a plain object, and what is wrong with one, in OpenAI's terms."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from ...core.errors import RequestError


def parse_object(data: bytes) -> dict[str, Any]:
    """The fields that are not null: null says the same as leaving a field out.

    Raises RequestError for anything but one JSON object of well-formed text.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _malformed(f"byte {error.start} is not UTF-8") from None
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _malformed(
            f"line {error.lineno}, column {error.colno}: {error.msg.lower()}"
        ) from None
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except ValueError as error:  # a number that is none, or has thousands of digits
        raise _malformed(str(error)) from None
    if not isinstance(found, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    return {name: value for name, value in found.items() if value is not None}


def first_fault(error: ValidationError, model: type[BaseModel]) -> RequestError:
    """The first thing wrong with a body: its field is the ``param``.

    Each field of ``model`` has a description that says what is allowed.
    """
    fault = error.errors(include_url=False, include_input=False)[0]
    name = str(fault["loc"][0])
    if fault["type"] == "missing":
        return RequestError(f"{name} is missing", param=name, code="missing_required_parameter")
    return RequestError(
        f"{name} must be {model.model_fields[name].description}",
        param=name,
        code="invalid_value",
    )


def well_formed(text: str, param: str) -> str:
    """Refuses half of a surrogate pair, which JSON can spell and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(
            f"{param} is no well-formed text: it has half a surrogate pair",
            param=param,
            code="invalid_value",
        ) from None
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _malformed(why: str) -> RequestError:
    return RequestError(f"the body is not valid JSON: {why}", code="invalid_json")
