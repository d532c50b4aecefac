"""API keys: who may ask, and how much at once.

A key is 256 random bits, shown once when it is made (``pdserve keys api FILE NAME``). The file
holds its SHA-256, which is enough to check it and useless to whoever reads it: nothing this
random can be guessed, so no slow hash is needed. Keys may also come from the environment, as
they are: ``PDSERVE_API_KEYS="alice=KEY,bob=KEY"``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import ConfigError
from .files import reason

ENVIRONMENT = "PDSERVE_API_KEYS"
_PREFIX = "pd-"
_MIN_LENGTH = 16  # characters of a key that somebody else has drawn
_MAX_KEYS = 10_000

_HEAD = (
    "# API keys, hashed; `pdserve keys api` adds one, and a line taken out takes one back.\n"
    "# The router reads this at its start.\n"
)

Limit = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]


class ApiKey(BaseModel):
    """``None`` is no limit. Each choice of an answer counts as a request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Limit | None = None
    max_concurrent: Limit | None = None


_FILE = TypeAdapter(Annotated[list[ApiKey], Field(max_length=_MAX_KEYS)])


@dataclass(frozen=True, slots=True)
class NewKey:
    entry: ApiKey
    secret: str


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def add_key(
    path: Path, name: str, requests_per_minute: int | None = None, max_concurrent: int | None = None
) -> NewKey:
    """Draws a key and writes its hash into the file, which may be a new one.

    Raises ConfigError for a wrong or taken name, a limit that is none, or a damaged file.
    """
    secret = _PREFIX + secrets.token_urlsafe(32)
    found = read_keys(path) if path.exists() else []
    try:
        entry = ApiKey(
            name=name,
            sha256=digest(secret),
            requests_per_minute=requests_per_minute,
            max_concurrent=max_concurrent,
        )
    except ValidationError as error:
        raise ConfigError(f"{name}: {_fault(error)}") from None
    if any(key.name == name for key in found):
        raise ConfigError(f"{path}: the name {name} is taken; give another, or take its entry out")
    entries = [key.model_dump(exclude_none=True) for key in (*found, entry)]
    text = _HEAD + yaml.safe_dump(entries, sort_keys=False)
    new = path.with_name(path.name + ".new")
    try:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        new.touch(mode=0o600)
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {reason(error)}") from error
    return NewKey(entry, secret)


def read_keys(path: Path) -> list[ApiKey]:
    """Raises ConfigError where the file is missing, damaged, or writable for others."""
    where = f"security.api_keys: {path}"
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"{where}: {reason(error)}; make a key with: pdserve keys api {path} NAME"
        ) from error
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not a text file") from None
    if mode & 0o022:
        raise ConfigError(f"{where} can be changed by other users; run: chmod go-w {path}")
    try:
        found = _FILE.validate_python(yaml.safe_load(text) or [])
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ConfigError(f"{where}: {_fault(error)}") from None
    return _distinct(found, where)


def all_keys(path: str | None, environment: Mapping[str, str] = os.environ) -> list[ApiKey]:
    """Those of the file and of the environment; none at all where neither is given."""
    found = read_keys(Path(path)) if path is not None else []
    given = environment.get(ENVIRONMENT, "").strip()
    for part in filter(None, (part.strip() for part in given.split(","))):
        name, separator, secret = part.partition("=")
        if not separator or len(secret) < _MIN_LENGTH:
            raise ConfigError(
                f"{ENVIRONMENT}: found an entry that is not NAME=KEY with at least "
                f"{_MIN_LENGTH} characters of key"
            )
        try:
            found.append(ApiKey(name=name, sha256=digest(secret)))
        except ValidationError as error:
            raise ConfigError(f"{ENVIRONMENT}: {_fault(error)}") from None
    return _distinct(found, "security.api_keys")


def _distinct(keys: list[ApiKey], where: str) -> list[ApiKey]:
    names = [key.name for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where}: the name {name} stands twice")
    return keys


def _fault(error: ValidationError) -> str:
    """Where, and what is allowed; never the value."""
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg'].lower()}"
