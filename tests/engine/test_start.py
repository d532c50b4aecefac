"""What a process must import to prepare a model, and to run one: it decides how fast it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pdserve


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pdserve.engine.prepare", ("torch", "transformers", "gguf", "tokenizers")),
        ("pdserve.engine.build", ("transformers", "gguf", "tokenizers", "triton")),
    ],
)
def test_what_is_not_imported(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; sys.exit(' '.join(sys.modules.keys() & set({absent!r})))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(pdserve.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr.strip() == ""
