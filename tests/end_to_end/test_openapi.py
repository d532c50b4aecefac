"""What the served description allows, and what it forbids, is sent: nothing is ever a 5xx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from served import Server

LIMIT_S = 25
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


def test_calls_made_of_the_description(simulated: Server, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "schemathesis.cli", "run"),
            f"{simulated.url}/openapi.json",
            *("--checks", ",".join(CHECKS)),
            *("--max-time", str(LIMIT_S)),
            *("--request-timeout", "10"),  # what takes longer has failed
            *("--generation-deterministic", "--no-color", "--warnings", "off"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=4 * LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Tested: 8" in done.stdout, done.stdout  # every operation, within the time
    simulated.at_rest()
