"""The live page: one file, with nothing fetched from anywhere but this router.

Its policy lets nothing run or load but its own script and style, named by their hashes: what
a model writes is shown as text, and could do nothing if it were not.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Page:
    text: str

    @property
    def headers(self) -> dict[str, str]:
        parts = {kind: _hashes(self.text, kind) for kind in ("script", "style")}
        return {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": (
                f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
                f"form-action 'none'; frame-ancestors 'none'; "
                f"script-src {parts['script']}; style-src {parts['style']}"
            ),
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }


def _hashes(text: str, kind: str) -> str:
    found = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
    digests = [hashlib.sha256(part.encode()).digest() for part in found]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


PAGE = Page((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
