"""Children kept alive and ended in order: real processes, tiny programs."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pdserve.core.errors import ConfigError, PdserveError, StartupError
from pdserve.core.supervised import UP
from pdserve.deploy.backoff import RestartPolicy
from pdserve.deploy.child import Child, Command, describe_exit
from pdserve.deploy.supervisor import Stage, Supervisor

FAST = RestartPolicy(first_s=0.01, longest_s=0.05, healthy_s=60.0, loop_lives=4)
LIMIT_S = 20.0

STAY = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + STAY


def command(name: str, code: str, *arguments: str) -> Command:
    return Command(name, (sys.executable, "-c", code, *arguments))


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), LIMIT_S)

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the world outside has no event
        await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    """Ended, if not yet reaped by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def stopped(supervisor: Supervisor, *names: str, limit_s: float = 5.0) -> None:
    await supervisor.stop([Stage((name,), limit_s) for name in names], asyncio.Event())


def test_lines_pass_with_a_prefix_and_the_last_sentence_is_kept() -> None:
    async def test() -> None:
        lines: list[str] = []
        code = (
            "import sys; print('one'); sys.stdout.flush();"
            "sys.stderr.write('two\\nthr\\xe9e\\npdserve: it is full\\nx'); sys.exit(3)"
        )
        child = Child(command("w", code), lines.append)
        assert await child.wait() == 3
        assert lines == ["w | one", "w | two", "w | thr\u00e9e", "w | x"]
        assert child.sentence == child.last_words == "it is full"

    run(test)


def test_an_endless_line_is_passed_on_in_parts() -> None:
    async def test() -> None:
        lines: list[str] = []
        child = Child(command("w", "print('x' * 100_000)"), lines.append)
        assert await child.wait() == 0
        assert "".join(line.removeprefix("w | ") for line in lines) == "x" * 100_000
        assert max(map(len, lines)) < 10_000

    run(test)


def test_what_a_child_started_ends_with_it() -> None:
    async def test() -> None:
        lines: list[str] = []
        code = (
            "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]);"
            "print(p.pid)"
        )
        child = Child(command("w", code, STAY), lines.append)
        assert await child.wait() == 0
        grandchild = int(lines[0].removeprefix("w | "))
        await until(lambda: gone(grandchild))

    run(test)


def test_a_child_that_dies_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        supervisor = Supervisor(lambda line: None, FAST)
        supervisor.keep(command("w", STAY))
        supervisor.settle()
        await until(lambda: supervisor.pid("w") is not None)
        first = supervisor.pid("w")
        assert first is not None
        os.kill(first, 9)
        await until(lambda: supervisor.pid("w") not in (None, first))
        second = supervisor.pid("w")
        await stopped(supervisor, "w")
        assert second is not None
        assert gone(first)
        assert gone(second)

    run(test)
    assert "w ended (killed by SIGKILL); starting it again in 0.0 s" in caplog.text


def test_a_crash_loop_is_told_once_with_its_last_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = tmp_path / "count"
    code = (
        "import sys; open(sys.argv[1], 'a').write('x'); print('no such block', file=sys.stderr);"
        "sys.exit(7)"
    )

    async def test() -> None:
        supervisor = Supervisor(lambda line: None, FAST)
        supervisor.settle()
        supervisor.keep(command("w", code, str(count)))
        await until(lambda: count.exists() and count.stat().st_size >= 7)
        await stopped(supervisor, "w")

    run(test)
    loud = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert loud == [
        "w has ended 4 times in a row soon after its start (exit code 7); "
        "its last words: no such block; trying on, ever more slowly"
    ]
    quiet = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(quiet) == 3
    assert quiet[0] == "w ended (exit code 7); starting it again in 0.0 s"


def test_who_cannot_start_again_says_why_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = tmp_path / "count"
    code = (
        "import sys; open(sys.argv[1], 'a').write('x'); print('pdserve: 5GiB do not fit');"
        "sys.exit(1)"
    )

    async def test() -> None:
        supervisor = Supervisor(lambda line: None, FAST)
        supervisor.settle()
        supervisor.keep(command("w", code, str(count)))
        await until(lambda: count.exists() and count.stat().st_size >= 7)
        await stopped(supervisor, "w")

    run(test)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "w ended (exit code 1: 5GiB do not fit); starting it again in 0.0 s",
        "w has ended 4 times in a row soon after its start (exit code 1); "
        "its last words: 5GiB do not fit; trying on, ever more slowly",
    ]


def test_kills_from_outside_are_no_crash_loop(caplog: pytest.LogCaptureFixture) -> None:
    """As a child of ``serve``, it says when it is up."""

    async def test() -> None:
        lines = list[str]()
        patient = RestartPolicy(first_s=0.0, longest_s=600.0, loop_lives=4)
        supervisor = Supervisor(lines.append, patient)
        supervisor.keep(command("w", f"print('{UP}');" + STAY))
        supervisor.settle()
        for count in range(1, 9):
            await until(lambda count=count: len(lines) == count)  # type: ignore[misc]
            pid = supervisor.pid("w")
            assert pid is not None
            os.kill(pid, 9)
            await until(lambda pid=pid: supervisor.pid("w") != pid)  # type: ignore[misc]
        await stopped(supervisor, "w")

    run(test)
    told = [r.getMessage() for r in caplog.records]
    assert told == ["w ended (killed by SIGKILL); starting it again in 0.0 s"] * 8


@pytest.mark.parametrize(("code", "kind"), [(1, StartupError), (2, ConfigError)])
def test_a_sentence_at_the_first_start_ends_the_bringing_up(
    code: int, kind: type[PdserveError]
) -> None:
    async def test() -> None:
        supervisor = Supervisor(lambda line: None, FAST)
        supervisor.keep(command("ok", STAY))
        supervisor.keep(
            command("w", f"print('pdserve: port 80 is taken'); raise SystemExit({code})")
        )
        error = await supervisor.failed()
        assert type(error) is kind
        assert str(error) == "port 80 is taken"
        await stopped(supervisor, "ok", "w")

    run(test)


def test_dying_again_and_again_ends_the_bringing_up() -> None:
    async def test() -> None:
        supervisor = Supervisor(lambda line: None, FAST)
        supervisor.keep(command("w", "import os; os.abort()"))
        error = await supervisor.failed()
        assert str(error).startswith("w has ended 4 times in a row soon after its start (killed by")
        await stopped(supervisor, "w")

    run(test)


def test_a_program_that_is_not_there() -> None:
    async def test() -> None:
        supervisor = Supervisor(lambda line: None, FAST)
        supervisor.keep(Command("w", ("/nonexistent/program",)))
        assert "the system would not start it" in str(await supervisor.failed())
        await stopped(supervisor, "w")

    run(test)


def test_stages_end_one_after_the_other(tmp_path: Path) -> None:
    story = tmp_path / "story"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(float(sys.argv[3]))\n"
        "    open(sys.argv[1], 'a').write(sys.argv[2])\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('up', flush=True)\n"
        "signal.pause()\n"
    )

    async def test() -> None:
        lines: list[str] = []
        supervisor = Supervisor(lines.append, FAST)
        supervisor.keep(command("router", code, str(story), "r", "0.3"))
        supervisor.keep(command("worker", code, str(story), "w", "0"))
        await until(lambda: len(lines) == 2)
        await stopped(supervisor, "router", "worker")

    run(test)
    assert story.read_text() == "rw"


def test_who_does_not_end_in_time_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        lines: list[str] = []
        supervisor = Supervisor(lines.append, FAST)
        supervisor.keep(command("w", STUBBORN))
        await until(lambda: bool(lines))
        pid = supervisor.pid("w")
        assert pid is not None
        await stopped(supervisor, "w", limit_s=0.1)
        assert gone(pid)

    run(test)
    assert "w did not end in time; killed" in caplog.text


def test_in_a_hurry_nothing_is_waited_for() -> None:
    async def test() -> None:
        lines: list[str] = []
        supervisor = Supervisor(lines.append, FAST)
        supervisor.keep(command("w", STUBBORN))
        await until(lambda: bool(lines))
        hurry = asyncio.Event()
        stop = asyncio.create_task(supervisor.stop([Stage(("w",), 600.0)], hurry))
        await asyncio.sleep(0.05)
        assert not stop.done()
        hurry.set()
        await stop
        assert supervisor.pid("w") is None

    run(test)


def test_stop_does_not_wait_for_a_child_that_waits_to_be_started() -> None:
    async def test() -> None:
        slow = RestartPolicy(first_s=600.0, longest_s=600.0)
        supervisor = Supervisor(lambda line: None, slow)
        supervisor.settle()
        supervisor.keep(command("w", "raise SystemExit(1)"))
        await until(lambda: supervisor.pid("w") is not None)
        await until(lambda: supervisor.pid("w") is None)
        await stopped(supervisor, "w")

    run(test)


def test_exits_in_words() -> None:
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(-15) == "killed by SIGTERM"
    assert describe_exit(-250) == "killed by signal 250"
