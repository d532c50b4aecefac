"""The command as a person meets it: what it prints, refuses, and leaves behind."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from served import SPLIT, Server, deployment, ready_url, run, start


def test_the_printed_curl_line_works_as_pasted(tmp_path: Path) -> None:
    process = start(deployment(tmp_path, SPLIT))
    try:
        assert process.stdout is not None
        ready_url(process)
        line = process.stdout.readline()
        words = shlex.split(line)
        assert words[0] == "curl"
        done = subprocess.run(["curl", "-sS", *words[1:]], capture_output=True, timeout=60)
        assert b'"chat.completion"' in done.stdout, (done.stdout, done.stderr)
        children = _children(process.pid)
        assert len(children) == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = re.search(r"\) \S (\d+)", (folder / "stat").read_text())
            except OSError:
                continue
            if parent is not None and int(parent[1]) == pid:
                found.append(int(folder.name))
    return found


def test_killed_outright_its_children_go_with_it(tmp_path: Path) -> None:
    process = start(deployment(tmp_path, SPLIT))
    try:
        ready_url(process)
        children = _children(process.pid)
        assert children
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.read()  # ends once no child holds the pipe
        process.stdout.close()
    end = time.monotonic() + 10
    while left := [pid for pid in children if _runs(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)  # the kernel ends them; there is no event of that for a stranger


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_status_shows_both_pools(server: Server) -> None:
    done = run(["status", server.url])
    assert done.returncode == 0, done.stderr
    assert "prefill-0" in done.stdout and "decode-0" in done.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {path: smollm2}\nrooter: {port: 1}\n", ["rooter", "router"]),
        ("model: {path: /nowhere/at/all}\n", ["/nowhere/at/all"]),
        ("pools: {prefill: {workers: 1}}\n", ["model"]),
    ],
)
def test_a_wrong_file_is_one_sentence_and_exit_code_2(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    done = run(["serve", str(deployment(tmp_path, text))])
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), done.stderr
    assert "Traceback" not in done.stderr
