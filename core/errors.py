"""The tree of errors. Foreign errors are mapped into it once, at the edge where they arise.

    PdserveError
    ├── ConfigError        a file or option is wrong              exit code 2
    ├── StartupError       it is right, but can't be brought up    exit code 1
    │   ├── WeightsError
    │   └── OutOfMemory
    ├── RequestError       what a client sent is wrong            HTTP 4xx
    │   └── Unavailable    the deployment can't serve it now       HTTP 429, 503, 504
    └── WireError          what a peer sent is wrong
        ├── MalformedMessage
        └── HandshakeRefused

Anything else that escapes is a bug of ours.
"""

from __future__ import annotations


class PdserveError(Exception):
    """The root: its text is a sentence for a person."""


class ConfigError(PdserveError):
    """A file or option that can't be used: which key, what was found, what is allowed."""


class StartupError(PdserveError):
    """A correct deployment that can't be brought up here; the text says why and what to change."""


class WeightsError(StartupError):
    """Weights that are missing, damaged, or of a model we do not run."""


class OutOfMemory(StartupError):
    """The device has no room; the text says which setting asks for less."""


class RequestError(PdserveError):
    """A request refused in words.

    ``status`` is the HTTP status, ``param`` the field at fault (OpenAI's term),
    ``code`` a short machine-readable word.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class Unavailable(RequestError):
    """The request is fine, the deployment is not able; ``retry_after`` in seconds where known."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 503,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, status=status, code=code)
        self.retry_after = retry_after


class WireError(PdserveError):
    """What a peer sent can't be used."""


class MalformedMessage(WireError):
    """Bytes that are not one of our messages, or a message out of bounds."""


class HandshakeRefused(WireError):
    """Two ends that can't exchange KV blocks; the text names the difference."""
