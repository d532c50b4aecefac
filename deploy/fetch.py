"""What a router says over HTTP, read with a bound on the wait. No proxy is asked.

Who asks shows the key in ``PDSERVE_API_KEY``, or else, to a router of this user on this host,
the token that lies in its run folder. Such a router's own certificate is trusted, too.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import ssl
from collections.abc import Generator, Mapping
from typing import Any
from urllib.parse import urlsplit

from ..core.errors import PdserveError
from ..core.keys import is_loopback
from .rundir import base_folder

_MAX_BYTES = 16 << 20
_EVENT = b"data: "


class Unreachable(PdserveError):
    """Nobody answers there, or not in JSON over HTTP."""


def get_json(url: str, timeout_s: float) -> tuple[int, Any]:
    """The status and the body of ``GET url``; raises Unreachable. It blocks."""
    connection, path = _connect(url, timeout_s)
    try:
        connection.request("GET", path, headers=_credentials(url))
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
        given = {"Content-Type": "application/json", **_credentials(url), **headers}
        connection.request("POST", path, data, given)
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
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Unreachable(f"{url}: not an http:// or https:// address")
    try:
        host, port = parts.hostname, parts.port
        if parts.scheme == "http":
            connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        else:
            connection = http.client.HTTPSConnection(
                host, port, timeout=timeout_s, context=_trust(url)
            )
    except ValueError as error:  # a port that is none
        raise Unreachable(f"{url}: {error}") from error
    return connection, parts.path or "/"


def _credentials(url: str) -> dict[str, str]:
    key = os.environ.get("PDSERVE_API_KEY") or own(url).get("token")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _trust(url: str) -> ssl.SSLContext:
    """The host's authorities, or for a router of our own its certificate, whatever its name."""
    certificate = own(url).get("certificate")
    if certificate is None:
        return ssl.create_default_context()
    try:
        context = ssl.create_default_context(cafile=certificate)
    except (OSError, ssl.SSLError) as error:
        raise Unreachable(f"{url}: its certificate can't be read: {error}") from error
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def own(url: str) -> dict[str, Any]:
    """What the router at that port of this host left in its run folder, if this user started
    it; nothing for another host, which is not to be shown a token."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    for path in sorted(base_folder().glob("*/http.json")):
        with contextlib.suppress(OSError, ValueError):  # one that ends just now
            if path.stat().st_uid != os.getuid():
                continue
            found: dict[str, Any] = json.loads(path.read_bytes())
            if found.get("port") == port and (is_loopback(host) or found.get("host") == host):
                return found
    return {}


def _no_answer(url: str, error: Exception) -> Unreachable:
    return Unreachable(f"no answer from {url}: {error or type(error).__name__}")


def _no_router(url: str) -> Unreachable:
    return Unreachable(f"{url} is no pdserve router: its answer is not JSON")
