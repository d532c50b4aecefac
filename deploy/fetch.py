"""What a router says over HTTP, read with a bound on the wait. No proxy is asked."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Mapping
from typing import Any
from urllib.parse import urlsplit

from ..core.errors import PdserveError

_MAX_BYTES = 16 << 20
_EVENT = b"data: "


class Unreachable(PdserveError):
    """Nobody answers there, or not in JSON over HTTP."""


def get_json(url: str, timeout_s: float) -> tuple[int, Any]:
    """The status and the body of ``GET url``; raises Unreachable. It blocks."""
    connection, path = _connect(url, timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read(_MAX_BYTES))
    except (OSError, http.client.HTTPException) as error:
        raise _no_answer(url, error) from error
    except ValueError as error:
        raise _no_router(url) from error
    finally:
        connection.close()


def post_events(
    url: str, body: Any, timeout_s: float, headers: Mapping[str, str]
) -> Generator[dict[str, Any], None, None]:
    """The events of a stream, up to ``[DONE]``; the only one is the body where it is no stream.

    Raises Unreachable. It blocks; closed before its end, it hangs up.
    """
    connection, path = _connect(url, timeout_s)
    try:
        data = json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        if response.getheader("Content-Type", "").startswith("application/json"):
            yield json.loads(response.read(_MAX_BYTES))
            return
        for line in response:
            if line.startswith(_EVENT):
                event = line.removeprefix(_EVENT).strip()
                if event == b"[DONE]":
                    return
                yield json.loads(event)
    except (OSError, http.client.HTTPException) as error:
        raise _no_answer(url, error) from error
    except ValueError as error:
        raise _no_router(url) from error
    finally:
        connection.close()


def _connect(url: str, timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise Unreachable(f"{url}: not an http:// address")
    try:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
    except ValueError as error:  # a port that is none
        raise Unreachable(f"{url}: {error}") from error
    return connection, parts.path or "/"


def _no_answer(url: str, error: Exception) -> Unreachable:
    return Unreachable(f"no answer from {url}: {error or type(error).__name__}")


def _no_router(url: str) -> Unreachable:
    return Unreachable(f"{url} is no pdserve router: its answer is not JSON")
