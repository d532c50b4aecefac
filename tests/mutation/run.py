"""``make mutations``: takes each guard out of a copy of the tree, and expects its tests to fail.

First all tests are run on the copy as it is: they must pass there, or their failing would say
nothing. A test that hangs without its guard has missed it, too. Words in the arguments pick the
guards whose names have them. The exit code is 1 where a guard is not missed by anybody.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from guards import GUARDS

ROOT = Path(__file__).parents[2]
LIMIT_S = 600.0


def copy_tree(target: Path) -> None:
    """What git knows or would know of, and the package's links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    subprocess.run(
        ["tar", "-c", "--null", "--ignore-failed-read", "-T", "-", "-f", f"{target}.tar"],
        cwd=ROOT,
        input=listed,
        check=True,
    )
    target.mkdir()
    subprocess.run(["tar", "-x", "-f", f"{target}.tar", "-C", target], check=True)


def passes(tree: Path, tests: Sequence[str]) -> bool:
    """Whether all of these tests pass there; False, too, where they do not end."""
    options = ("-x", "-m", "not slow", "-p", "no:cacheprovider")
    command = [sys.executable, "-P", "-m", "pytest", *options]
    try:
        done = subprocess.run(
            [*command, *tests], cwd=tree, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return False
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 0


def main(words: Sequence[str]) -> int:
    chosen = [guard for guard in GUARDS if all(word in guard.name for word in words)]
    unmissed = []
    with tempfile.TemporaryDirectory(prefix="pdserve-mutations-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        if not passes(tree, sorted({test for guard in chosen for test in guard.missed_by})):
            print("the tests do not pass with every guard in its place", file=sys.stderr)
            return 1
        for guard in chosen:
            file, started = tree / guard.file, time.monotonic()
            whole = file.read_text(encoding="utf-8")
            file.write_text(guard.taken_out_of(whole), encoding="utf-8")
            missed = not passes(tree, guard.missed_by)
            file.write_text(whole, encoding="utf-8")
            seconds = time.monotonic() - started
            word = "missed" if missed else "NOT MISSED"
            print(f"{word}: {guard.name} ({seconds:.0f} s)", flush=True)
            if not missed:
                unmissed.append(guard)
    print(f"{len(chosen) - len(unmissed)} of {len(chosen)} guards are missed by a test")
    return 1 if unmissed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
