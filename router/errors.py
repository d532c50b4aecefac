"""Errors as OpenAI's clients expect them: one envelope, whatever went wrong."""

from __future__ import annotations

import math
from typing import Any

from aiohttp import web

from ..core.errors import RequestError, Unavailable

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}


def envelope(error: RequestError) -> dict[str, Any]:
    server = error.status >= 500
    kind = _TYPES.get(error.status, "server_error" if server else "invalid_request_error")
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }


def error_response(error: RequestError) -> web.Response:
    headers = {}
    if isinstance(error, Unavailable) and error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(envelope(error), status=error.status, headers=headers)


def internal_error() -> RequestError:
    """All that a client hears of a bug of ours."""
    return RequestError("an internal error", status=500, code="internal_error")


def of_http(error: web.HTTPException) -> RequestError:
    """What aiohttp itself has to say about a request, in our terms."""
    match error.status:
        case 404:
            return RequestError("there is nothing at this path", status=404, code="not_found")
        case 405:
            return RequestError(
                "this path does not take that method", status=405, code="method_not_allowed"
            )
        case 413:
            return RequestError("the body is too large", status=413, code="body_too_large")
        case _:
            return RequestError(error.reason, status=error.status)
