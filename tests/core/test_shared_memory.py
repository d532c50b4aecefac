"""Memory that two processes share: who finds it, who does not, and what a crash leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pdserve
from pdserve.core.errors import HandshakeRefused, OutOfMemory
from pdserve.core.shared_memory import FOLDER, SharedMemory, sweep

OWNER = """
import sys
from pathlib import Path
from pdserve.core.shared_memory import SharedMemory
memory = SharedMemory.create(8192, Path(sys.argv[1]))
memory.view[:5] = b"hello"
print(memory.name, memory.nonce.hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path  # not the host's own: others' files are not for a test to sweep


@pytest.fixture
def owner(folder: Path) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", OWNER, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(pdserve.__file__).parent.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield child
    child.kill()
    child.communicate()


def found(owner: subprocess.Popen[str], folder: Path) -> SharedMemory:
    assert owner.stdout is not None
    name, nonce = owner.stdout.readline().split()
    return SharedMemory.attach(name, bytes.fromhex(nonce), 8192, folder)


def test_one_writes_and_the_other_reads(folder: Path) -> None:
    ours = SharedMemory.create(8192, folder)
    theirs = SharedMemory.attach(ours.name, ours.nonce, 8192, folder)
    assert bytes(theirs.view) == bytes(8192)
    ours.view[100:103] = b"new"
    assert bytes(theirs.view[100:103]) == b"new"
    with pytest.raises(TypeError):
        theirs.view[0] = 1
    assert (folder / ours.name).stat().st_mode & 0o777 == 0o600
    ours.close()
    ours.close()  # twice is once
    assert not list(folder.iterdir())
    assert bytes(theirs.view[100:103]) == b"new"  # what is mapped stays


def test_what_is_not_the_peers_is_refused(folder: Path) -> None:
    ours = SharedMemory.create(8192, folder)
    (folder / "elsewhere").write_bytes(bytes(20_000))
    link = f"pdserve-{os.getuid()}-{'a' * 32}"
    (folder / link).symlink_to(folder / ours.name)
    for name, nonce, size, said in (
        (ours.name, bytes(16), 8192, "not what the peer speaks of"),
        (ours.name, ours.nonce, 4096, "bytes, not"),
        ("../elsewhere", ours.nonce, 8192, "no name"),
        ("elsewhere", ours.nonce, 8192, "no name"),
        (link, ours.nonce, 8192, "symbolic links"),
        (f"pdserve-{os.getuid()}-{'b' * 32}", ours.nonce, 8192, "another host"),
    ):
        with pytest.raises(HandshakeRefused, match=said):
            SharedMemory.attach(name, nonce, size, folder)


def test_what_nobody_refers_to_is_gone_but_what_is_seen_of_it(folder: Path) -> None:
    ours = SharedMemory.create(8192, folder)
    view = ours.view
    view[:3] = b"abc"
    assert list(folder.iterdir())
    del ours
    assert not list(folder.iterdir())
    assert bytes(view[:3]) == b"abc"


def test_no_room_is_said_at_once() -> None:
    def held() -> list[str]:
        """What this process has open there: others come and go meanwhile."""
        links = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
        return [path for path in links if path.startswith(f"{FOLDER}/")]

    before = held()
    with pytest.raises(OutOfMemory, match=r"no room for it; lower kv\.memory"):
        SharedMemory.create(1 << 46)
    with pytest.raises(OutOfMemory, match="no such file"):
        SharedMemory.create(4096, Path("/nowhere"))
    assert held() == before


def test_a_reader_sees_its_owner_die_and_the_next_start_waits_for_it(
    owner: subprocess.Popen[str], folder: Path
) -> None:
    memory = found(owner, folder)
    assert bytes(memory.view[:5]) == b"hello" and not memory.owner_gone
    assert sweep(folder=folder) == []  # it lives
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert memory.owner_gone
    assert (folder / memory.name).exists()
    went = threading.Event()

    def let_go() -> None:
        went.set()
        memory.close()

    letting_go = threading.Timer(0.3, let_go)
    letting_go.start()
    assert sweep(100.0, folder) == [memory.name]
    assert went.is_set()  # it was waited for
    letting_go.join()
    assert not list(folder.iterdir())
    assert bytes(memory.view[:5]) == b"hello"


def test_patience_with_a_reader_ends(owner: subprocess.Popen[str], folder: Path) -> None:
    memory = found(owner, folder)
    owner.kill()
    owner.wait()
    assert sweep(0.1, folder) == [memory.name]
    memory.close()


def test_an_owner_that_ends_well_leaves_nothing(owner: subprocess.Popen[str], folder: Path) -> None:
    memory = found(owner, folder)
    owner.communicate("")
    assert owner.returncode == 0
    assert not list(folder.iterdir()) and memory.owner_gone
    memory.close()
