"""``serve`` from its first child to its last, with tiny programs in place of the real ones."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdserve.deploy import fetch

FAKE = Path(__file__).with_name("fake_program.py")
LIMIT_S = 20.0

SERVE = """
import sys
from pathlib import Path
from pdserve.cli import main
from pdserve.deploy import commands
commands.PROGRAM = (sys.executable, "-P", sys.argv[1])
sys.exit(main(["serve", *sys.argv[2:]]))
"""


@dataclass(frozen=True)
class Served:
    """A running ``serve``. ``story`` is what its children wrote."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def story(self) -> list[str]:
        file = self.folder / "story"
        return file.read_text().splitlines() if file.exists() else []

    def pids(self) -> dict[str, int]:
        """The newest process of each child."""
        found = (re.fullmatch(r"(.*) is up, pid (\d+)", line) for line in self.story)
        return {match[1]: int(match[2]) for match in found if match}

    def run_dirs(self) -> list[Path]:
        base = self.folder / "pdserve"
        return [path for path in base.iterdir() if path.is_dir()] if base.exists() else []

    def ready(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"ready: (http://\S+)", line)
        assert found is not None, line
        return found[1]

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(LIMIT_S)

    def nothing_is_left(self) -> None:
        until(lambda: all(gone(pid) for pid in self.pids().values()))
        assert self.run_dirs() == []


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Ended, if not yet reaped by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def answers(url: str) -> bool:
    try:
        return fetch.get_json(url, 2.0)[0] == 200
    except fetch.Unreachable:
        return False


Serve = Callable[..., Served]


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[Served] = []
    folders = contextlib.ExitStack()

    def start(*arguments: str, fault: str = "", folder: Path | None = None) -> Served:
        if folder is None:  # pytest's own are too deep for the path of a unix socket
            folder = Path(folders.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        file = folder / "d.yaml"
        file.write_text("model: {path: m}\nrouter: {port: 0}\n")
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVE, str(FAKE), str(file), *arguments],
            env={
                **os.environ,
                "FAULT": fault,
                "STORY": str(folder / "story"),
                "XDG_RUNTIME_DIR": str(folder),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(Served(process, folder))
        return started[-1]

    yield start
    for served in started:
        served.process.kill()
        served.process.communicate()
    folders.close()


def test_up_and_down(serve: Serve) -> None:
    served = serve("--set", "pools.decode.workers=2")
    url = served.ready()
    assert url.startswith("http://127.0.0.1:")
    assert served.process.stdout is not None
    assert served.process.stdout.readline().startswith(f"  curl {url}/v1/")
    assert set(served.pids()) == {"router", "prefill-0", "decode-0", "decode-1"}
    (run_dir,) = served.run_dirs()
    assert run_dir.stat().st_mode & 0o777 == 0o700
    assert served.end(signal.SIGINT) == 0
    assert served.story.index("router ended") < served.story.index("decode-0 ended")
    served.nothing_is_left()


def test_sigterm_ends_it_too(serve: Serve) -> None:
    served = serve()
    served.ready()
    assert served.end(signal.SIGTERM) == 0
    assert {"router ended", "prefill-0 ended", "decode-0 ended"} <= set(served.story)
    served.nothing_is_left()


def test_a_second_signal_ends_it_at_once(serve: Serve) -> None:
    served = serve(fault="stubborn")
    served.ready()
    served.process.send_signal(signal.SIGINT)
    until(lambda: "router is stubborn" in served.story)
    assert served.end(signal.SIGINT) == 130
    served.nothing_is_left()


def test_a_worker_that_is_killed_comes_back(serve: Serve) -> None:
    served = serve()
    served.ready()
    first = served.pids()["decode-0"]
    os.kill(first, signal.SIGKILL)
    until(lambda: served.pids()["decode-0"] != first)
    assert served.end(signal.SIGINT) == 0
    served.nothing_is_left()


def test_a_router_that_is_killed_comes_back_on_its_port(serve: Serve) -> None:
    served = serve()
    url = served.ready()
    os.kill(served.pids()["router"], signal.SIGKILL)
    until(lambda: sum(line.startswith("router is up") for line in served.story) == 2)
    until(lambda: answers(f"{url}/ready"))
    assert served.end(signal.SIGINT) == 0


def test_children_end_with_a_supervisor_that_is_killed_and_the_next_one_sweeps(
    serve: Serve,
) -> None:
    served = serve()
    served.ready()
    served.process.kill()
    until(lambda: all(gone(pid) for pid in served.pids().values()))
    (left,) = served.run_dirs()
    following = serve(folder=served.folder)
    following.ready()
    assert left not in following.run_dirs()
    assert following.end(signal.SIGINT) == 0
    following.nothing_is_left()


@pytest.mark.parametrize(
    ("fault", "code", "sentence"),
    [
        ("no weights", 2, "model.path: found 'm', which does not exist"),
        ("port taken", 1, "router.port: 127.0.0.1:8000 is taken; give another"),
        ("decode-0 out of memory", 1, "kv.memory: 5GiB do not fit"),
        ("prepare dies", 1, "preparing the weights failed (killed by SIGABRT)"),
    ],
)
def test_what_cannot_be_brought_up_is_one_sentence(
    serve: Serve, fault: str, code: int, sentence: str
) -> None:
    served = serve(fault=fault)
    out, err = served.process.communicate(timeout=LIMIT_S)
    assert served.process.returncode == code
    assert out == ""
    assert err.splitlines()[-1] == f"pdserve: {sentence}"
    assert err.count(sentence) == 1
    served.nothing_is_left()


def test_a_signal_while_it_is_brought_up(serve: Serve) -> None:
    served = serve(fault="slow prepare")
    until(lambda: "preparing" in served.story)
    assert served.end(signal.SIGTERM) == 0
    served.nothing_is_left()


def test_two_deployments_side_by_side(serve: Serve) -> None:
    one = serve()
    one.ready()
    two = serve(folder=one.folder)
    two.ready()
    assert len(two.run_dirs()) == 2
    assert one.end(signal.SIGINT) == 0
    assert len(two.run_dirs()) == 1
    assert two.end(signal.SIGINT) == 0
    two.nothing_is_left()
