"""The configuration reference, made of what is there anyway: names, defaults and what is
allowed from the schema, meanings from the comments of the file that names every key.

    python -P -m pdserve.core.config_reference configs/smollm2.yaml > docs/configuration.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pydantic import BaseModel

from .config import Deployment
from .config_faults import allowed

_KEY = re.compile(r"^( *)([a-z_]+):( [^#]*)?(?:# ?(.*))?$")
_MORE = re.compile(r"^ +# ?(.*)$")

_HEAD = """# Configuration

<!-- Made by `make docs` from core/config.py and configs/smollm2.yaml: change those. -->

A deployment is one YAML file. Every key has a default but `model.path`; a key that does not
exist, a value of the wrong kind, or a key that stands twice is refused with a sentence. One
key can be changed for one run: `pdserve serve FILE --set pools.decode.workers=2`. Whether a
file is right, without bringing it up: `pdserve check FILE`.

[configs/smollm2.yaml](../configs/smollm2.yaml) is this page as a file to copy from.
"""


@dataclass(frozen=True, slots=True)
class Key:
    path: tuple[str, ...]
    default: str
    allowed: str


def reference(example: str) -> str:
    """The page as Markdown; ``example`` is the text of a file that names every key."""
    meanings = dict(_comments(example))
    parts = [_HEAD]
    for name, section in _sections(Deployment):
        title = ".".join(name)
        about = meanings.get(name, "")
        parts.append(f"\n## {f'`{title}`' if title else 'Beside the sections'}\n")
        if about:
            parts.append(f"\n{about[0].upper()}{about[1:]}.\n")
        parts.append("\n| key | default | allowed | what it is |\n|---|---|---|---|\n")
        for key in _keys(section, name):
            shared = key.path if key.path in meanings else (*_FULLEST, key.path[-1])
            row = (f"`{key.path[-1]}`", key.default, key.allowed, meanings.get(shared, ""))
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n")
    return "".join(parts)


_FULLEST = ("pools", "prefill")  # the pool whose keys the file explains, for all three


def _sections(
    section: type[BaseModel], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Those that hold keys, as they are nested; the file's own keys last."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _sections(inner, (*path, name))
    if any(_keys(section, path)):
        yield path, section


def _keys(section: type[BaseModel], path: tuple[str, ...]) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            continue
        text = "none: it must be given" if field.is_required() else f"`{_yaml(field.default)}`"
        yield Key((*path, name), text, allowed(inner, field))


def _yaml(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Enum():
            return str(value.value)
        case tuple():
            return f"[{', '.join(map(_yaml, value))}]"
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def _comments(example: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each key's comment, on its line and on those right under it."""
    path: list[str] = []
    found: list[str] = []
    for line in [*example.splitlines(), "end:"]:
        if (key := _KEY.match(line)) is not None:
            if path and found:
                yield tuple(path), " ".join(found)
            depth = len(key[1]) // 2
            path = [*path[:depth], key[2]]
            found = [key[4]] if key[4] else []
        elif (more := _MORE.match(line)) is not None and found:
            found.append(more[1])


if __name__ == "__main__":
    print(reference(Path(sys.argv[1]).read_text(encoding="utf-8")), end="")
