"""The package as source: its rooms, their modules, and what each module imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NOT_ROOMS = {"tests", "docs", "configs", "build", "dist"}


@dataclass(frozen=True, slots=True)
class Import:
    """``room`` imports ``target``: a dotted name, ``pdserve.`` in front for our own."""

    room: str  # "" for the modules beside the rooms: cli
    path: Path
    line: int
    target: str

    @property
    def top(self) -> str:
        return self.target.partition(".")[0]

    @property
    def target_room(self) -> str | None:
        """The room of ours that is imported, None for another package."""
        if self.top != "pdserve":
            return None
        name = self.target.removeprefix("pdserve.").partition(".")[0]
        return name if name in rooms() else ""

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.target}"


@cache
def rooms() -> tuple[str, ...]:
    """The folders beside pyproject.toml that hold modules of the package."""
    return tuple(
        sorted(
            path.name
            for path in ROOT.iterdir()
            if path.is_dir()
            and path.name not in NOT_ROOMS
            and not path.name.startswith(".")
            and any(path.glob("*.py"))
        )
    )


def modules(room: str) -> list[Path]:
    """A room's source files; those beside the rooms for ``""``."""
    return sorted((ROOT / room).rglob("*.py") if room else ROOT.glob("*.py"))


def module_name(path: Path) -> str:
    """``pdserve.kvtransfer.media`` for kvtransfer/media/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("pdserve", *(parts[:-1] if parts[-1] == "__init__" else parts)))


@cache
def imports(room: str) -> tuple[Import, ...]:
    """All imports of a room, those inside functions included."""
    return tuple(found for path in modules(room) for found in _imports(room, path))


def _imports(room: str, path: Path) -> Iterator[Import]:
    package = ("pdserve", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(room, path, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:  # ``from ..core import config`` names a module in alias
                target = ".".join((*base, *filter(None, [node.module]), alias.name))
                yield Import(room, path, node.lineno, target)
