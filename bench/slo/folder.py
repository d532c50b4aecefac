"""A folder of results: the runs, what else was found, and the report drawn from both.

runs/*.json.gz     every run, complete
plan.json          what was asked for, so that a later call goes on with the very same
answers/*.json     the greedy answers of each deployment
report.json, report.md, report.html, *.png
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import ConfigError
from .runs import Run


@dataclass(frozen=True, slots=True)
class Folder:
    path: Path
    _read: dict[str, Run] = field(default_factory=dict, compare=False, repr=False)  # by file

    @staticmethod
    def make(path: Path) -> Folder:
        try:
            (path / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
        return Folder(path)

    @staticmethod
    def existing(path: Path) -> Folder:
        if not (path / "runs").is_dir():
            raise ConfigError(f"{path}: no results of a benchmark here")
        return Folder(path)

    def runs(self) -> list[Run]:
        """In the order in which they were made."""
        for file in (self.path / "runs").glob("*.json.gz"):
            if file.name not in self._read:
                self._read[file.name] = Run.read(file)
        return sorted(self._read.values(), key=lambda run: run.created)

    def keep(self, run: Run) -> Path:
        load = run.load
        pace = f"c{load.concurrency}" if load.concurrency is not None else f"{load.rate or 0:.4g}"
        parts = (run.server.name, load.workload, pace, f"r{run.round}", f"{run.created:.0f}")
        name = re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(parts)).strip("-")
        path = self.path / "runs" / f"{name}.json.gz"
        run.save(path)
        return path

    def agree_on(self, plan: dict[str, Any]) -> None:
        """Keeps the plan, or refuses another one in a folder that has one."""
        file = self.path / "plan.json"
        text = json.dumps(plan, indent=2, sort_keys=True) + "\n"
        if not file.exists():
            file.write_text(text)
            return
        known = json.loads(file.read_bytes())
        new = json.loads(text)
        wrong = sorted(k for k in known.keys() | new.keys() if known.get(k) != new.get(k))
        if wrong:
            told = [key for key in wrong if key != "command"] or wrong
            raise ConfigError(
                f"{self.path}: its runs were made with other {' and '.join(told)} "
                "(see its plan.json); give another folder"
            )

    def plan(self) -> dict[str, Any]:
        file = self.path / "plan.json"
        found: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
        return found

    def keep_answers(self, name: str, answers: list[list[str]]) -> None:
        folder = self.path / "answers"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(answers, ensure_ascii=False) + "\n")

    def answers(self) -> dict[str, list[list[str]]]:
        """By the name of the server, in the order in which they came."""
        files = sorted((self.path / "answers").glob("*.json"), key=lambda f: f.stat().st_mtime_ns)
        return {file.stem: json.loads(file.read_bytes()) for file in files}
