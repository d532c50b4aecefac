"""One HTML page that holds the whole report, pictures included: a file to pass on."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plots, report
from .folder import Folder
from .measures import Objectives

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1180px;margin:2rem auto;padding:0 1rem}
h1,h2{font-weight:600}table{border-collapse:collapse;font-size:13px;margin:.6rem 0;display:block;
overflow-x:auto}td,th{border-bottom:1px solid #ddd;padding:.25rem .6rem;text-align:left;
white-space:nowrap}th{background:#f4f6f8}img{max-width:100%}code{background:#f4f6f8}
@media(prefers-color-scheme:dark){body{background:#16181b;color:#ddd}th,code{background:#24282d}
td,th{border-color:#333}img{background:#fff}}
"""


def write(folder: Folder, found: dict[str, Any]) -> None:
    """The PNG files, and report.html."""
    objectives = [Objectives.parse(text) for text in found["objectives"]]
    plan = found["plan"]
    target = (plan.get("search") or plan.get("staircase") or {}).get("target", 0.9)
    pictures = plots.draw(folder.runs(), objectives, target)
    paths = plots.save(pictures, folder.path)
    shown = list(zip((picture.title for picture in pictures), paths, strict=True))
    text = report.markdown(found, found.get("peer"))
    (folder.path / "report.html").write_text(page(text, shown), encoding="utf-8")


def page(markdown: str, pictures: Sequence[tuple[str, Path]]) -> str:
    """The report with its pictures before the runs."""
    before, separator, after = markdown.partition("## Runs")
    parts = [_html(before), *(_picture(*one) for one in pictures), _html(separator + after)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Benchmark report</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _picture(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    alt = html.escape(title)
    return f'<h2>{alt}</h2><img alt="{alt}" src="data:image/png;base64,{data}">'


def _html(markdown: str) -> str:
    """Of the little Markdown that the report is written in: headings, tables, lines."""
    parts: list[str] = []
    table: list[str] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if table:
            parts.append(_table(table))
            table = []
        if line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            parts.append(f"<h{level}>{html.escape(line.lstrip('# '))}</h{level}>")
        elif line:
            parts.append(f"<p>{_inline(line)}</p>")
    return "".join(parts)


def _table(lines: Sequence[str]) -> str:
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    heads = "".join(f"<th>{_inline(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{heads}</tr>{body}</table>"


def _inline(text: str) -> str:
    escaped = html.escape(text)
    for mark, tag in (("**", "strong"), ("`", "code")):
        pieces = escaped.split(mark)
        escaped = "".join(
            f"<{tag}>{piece}</{tag}>" if index % 2 else piece for index, piece in enumerate(pieces)
        )
    return escaped
