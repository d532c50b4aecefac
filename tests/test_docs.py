"""What the docs point at is there, and the commands that they show are right."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pdserve import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TO_COME = {"docs/api.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    here = [link for link in links if "://" not in link]
    missing = [link for link in here if not (page.parent / link).exists()]
    assert [link for link in missing if f"docs/{link}" not in TO_COME] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    text = re.sub(r"\\\n\s+", "", page.read_text(encoding="utf-8"))  # lines that go on
    found = re.findall(
        r"^    (?:\.venv/bin/)?pdserve ((?!is ready|.*\.\.\.).*)$", text, re.MULTILINE
    )
    for line in found:
        words = shlex.split(re.split(r"\s+#|\s{3,}| [|>] ", line)[0])
        if not any(word.isupper() or word.startswith("[") for word in words):
            try:
                cli._parser().parse_args(words)
            except SystemExit:
                pytest.fail(f"{page.name}: pdserve {line}")
