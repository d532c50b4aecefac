"""A JSON document of a router, read with a bound on the wait. No proxy is asked."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from ..core.errors import PdserveError

_MAX_BYTES = 16 << 20


class Unreachable(PdserveError):
    """Nobody answers there, or not in JSON over HTTP."""


def get_json(url: str, timeout_s: float) -> tuple[int, Any]:
    """The status and the body of ``GET url``; raises Unreachable. It blocks."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise Unreachable(f"{url}: not an http:// address")
    try:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
    except ValueError as error:  # a port that is none
        raise Unreachable(f"{url}: {error}") from error
    try:
        connection.request("GET", parts.path or "/")
        response = connection.getresponse()
        return response.status, json.loads(response.read(_MAX_BYTES))
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"no answer from {url}: {error or type(error).__name__}") from error
    except ValueError as error:
        raise Unreachable(f"{url} is no pdserve router: its answer is not JSON") from error
    finally:
        connection.close()
