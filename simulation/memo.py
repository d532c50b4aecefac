"""Runs that are known: a search for a capacity that was interrupted goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Point:
    """One whole run at ``rate``. ``attainment``: the share that was good, in the worst phase of
    the load; ``blocks``: the shares in parts of each phase, in the order of their coming."""

    rate: float
    attainment: float
    blocks: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Tried:
    """A run of one fleet. ``point`` is None where it was given up after ``got`` judged requests;
    ``moves`` as in ``Outcome``."""

    point: Point | None
    got: int
    moves: int


class Memo:
    """``path``: JSON lines, of which the first says what all the runs have in common (``of``);
    None keeps nothing. ConfigError where the file is of something else."""

    def __init__(self, path: Path | None, of: Any) -> None:
        self._path = path
        self._known: dict[str, Tried] = {}
        if path is None:
            return
        head = json.dumps(of)
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        lines, torn = lines[:-1], lines[-1:] not in ([], [""])  # whoever wrote it was stopped
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(head + "\n", encoding="utf-8")
            return
        if lines[0] != head:
            raise ConfigError(f"{path}: its runs are of other workers or loads: take them away")
        for line in lines[1:]:
            row = json.loads(line)
            self._known[row["run"]] = _TRIED.validate_python(row["tried"])
        if torn:
            path.write_text("\n".join([*lines, ""]), encoding="utf-8")

    def get(self, run: str) -> Tried | None:
        return self._known.get(run)

    def put(self, run: str, tried: Tried) -> None:
        self._known[run] = tried
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": run, "tried": asdict(tried)}) + "\n")


_TRIED = TypeAdapter(Tried)
