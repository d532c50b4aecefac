"""Who asks, and how much: API keys with a rate and a number at once for each.

A call is admitted by its key before anything of it is read; it pays for itself from its key's
minute, and for each choice more once its body is known; and it counts among its key's
concurrent requests until it is over.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Iterator, Sequence

from ..core.api_keys import ApiKey, digest
from ..core.clock import Clock
from ..core.errors import RequestError, Unavailable

_OPEN = frozenset(("/", "/health", "/ready", "/openapi.json"))
_ADMIN = "/admin/"  # asks for a token of its own
_MINUTE_S = 60.0
OWNER = "owner"


class Caller:
    """One key's account. Where it may ask so often a minute, it may do so all at once: what
    comes back then comes evenly (a token bucket)."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        requests_per_minute: int | None = None,
        max_concurrent: int | None = None,
    ) -> None:
        self.name = name
        self._per_minute = requests_per_minute
        self._max_concurrent = max_concurrent
        self._clock = clock
        self._left = float(requests_per_minute or 0)
        self._counted = clock()
        self._num_running = 0

    def pay(self, num_requests: int, of: int = 1) -> None:
        """For a call of ``of`` requests, some of which may be paid already. Raises Unavailable
        where the minute is used up, RequestError where no minute has room for the call."""
        if self._per_minute is None or num_requests == 0:
            return
        if of > self._per_minute:
            raise self._too_many(f"{self._per_minute} requests a minute")
        now = self._clock()
        rate = self._per_minute / _MINUTE_S
        self._left = min(self._per_minute, self._left + (now - self._counted) * rate)
        self._counted = now
        if self._left < num_requests:
            raise Unavailable(
                f"the key {self.name} has used up its {self._per_minute} requests a minute",
                status=429,
                code="rate_limit_exceeded",
                retry_after=(num_requests - self._left) / rate,
            )
        self._left -= num_requests

    @contextlib.contextmanager
    def running(self, num_requests: int) -> Iterator[None]:
        limit = self._max_concurrent
        if limit is not None and num_requests > limit:
            raise self._too_many(f"{limit} requests at once")
        if limit is not None and self._num_running + num_requests > limit:
            raise Unavailable(
                f"the key {self.name} has {self._num_running} requests running, of {limit}",
                status=429,
                code="concurrency_limit_exceeded",
                retry_after=1.0,
            )
        self._num_running += num_requests
        try:
            yield
        finally:
            self._num_running -= num_requests

    def _too_many(self, what: str) -> RequestError:
        return RequestError(
            f"this call asks for more choices than its key may: {what}",
            param="n",
            code="invalid_value",
        )


class Callers:
    """Without keys everybody may ask. ``token`` is the deployment's own, of its run folder."""

    def __init__(self, keys: Sequence[ApiKey], token: str, clock: Clock) -> None:
        self._keys = [
            (key.sha256, Caller(key.name, clock, key.requests_per_minute, key.max_concurrent))
            for key in keys
        ]
        self._keys.append((digest(token), Caller(OWNER, clock)))
        self._anybody = Caller("", clock) if not keys else None

    def of(self, path: str, authorization: str | None) -> Caller | None:
        """None where no key is asked for. Raises RequestError (401) without a right one.

        Every hash is compared, and whole, so that the time it takes tells nothing.
        """
        if path in _OPEN or path.startswith(_ADMIN):
            return None
        if self._anybody is not None:
            return self._anybody
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise _unknown("this server wants an API key: Authorization: Bearer KEY")
        given = digest(secret.strip())
        found = None
        for sha256, caller in self._keys:
            if hmac.compare_digest(sha256, given):
                found = caller
        if found is None:
            raise _unknown("this API key is not known here")
        return found


def _unknown(text: str) -> RequestError:
    return RequestError(text, status=401, code="invalid_api_key")
