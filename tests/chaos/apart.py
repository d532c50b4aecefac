"""Three hosts for SmolLM2 in fp32: the router on one, a prefill and a decode worker on the others.

KV and control go by tcp with keys. The hosts are network namespaces with a router in the middle,
which can lose every packet between two of them. All the while some of what the workers say to each
other is lost, doubled, late or damaged. Nobody starts the workers again: they must come
back by themselves. Only a thread that is on the router's host can ask it anything.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deployed import Deployed, files
from footprint import processes_of
from plan import FRONT
from served import START_LIMIT_S, STOP_LIMIT_S, Server, command, environment, ready_url
from three_hosts import ThreeHosts, three_hosts

T = TypeVar("T")
_ROLES = ("prefill", "decode")
_CONTROL = f"tcp://{ThreeHosts.address(FRONT)}:8100"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # they share one machine's cores
_WORKER = ("--join", _CONTROL, "--threads", "1")
_DEPLOYMENT = f"""
model: {{path: smollm2, dtype: fp32, max_context: 768}}
pools: {{}}
kv: {{memory: 48MiB}}  # of each worker: 68 blocks, for some 1,000 tokens
kv_transfer: {{medium: tcp, lease_s: 4}}
router: {{control: "{_CONTROL}", max_queue: 256}}
security: {{keys: keys}}
faults: {{kv: {{drop: 0.05, duplicate: 0.1, delay: 0.1, delay_ms: 500, damage: 0.05}}}}
"""


@dataclass
class Apart(Deployed):
    net: ThreeHosts
    processes: dict[str, subprocess.Popen[str]]  # the workers, by role

    def pids(self) -> dict[str, int]:
        return {role: process.pid for role, process in self.processes.items()}

    def _is_whole(self) -> bool:
        workers = self.server.workers().values()
        return {worker["pid"] for worker in workers} == set(self.pids().values()) and all(
            worker["state"] == "ready" and not worker["silent"] for worker in workers
        )


class NoHosts(Exception):
    """Why there are none."""


@contextlib.contextmanager
def hosts() -> Iterator[ThreeHosts]:
    """Raises NoHosts where this user may not make them."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(three_hosts())
        except (OSError, subprocess.CalledProcessError) as error:
            text = f"network namespaces need root, unshare, nsenter and ip: {error}"
            raise NoHosts(text) from error
        yield made


def on_front(net: ThreeHosts, job: Callable[[], T]) -> T:
    """Runs ``job`` on the router's host: what it starts is there, too."""
    with ThreadPoolExecutor(1, initializer=net.hosts[FRONT].enter) as thread:
        return thread.submit(job).result()


@contextlib.contextmanager
def apart(net: ThreeHosts, left: list[str]) -> Iterator[Apart]:
    """Up until the block ends, which is run ``on_front``. Then the router is ended with SIGINT; it
    sends the workers away, and ``left`` is told what is still there, or did not end well."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-", dir="/tmp")))
        (folder / "run").mkdir()
        (folder / "deployment.yaml").write_text(_DEPLOYMENT)

        def start(host: str, *arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                net.hosts[host].command(*command(*arguments)),
                cwd=folder,
                env=environment() | _ONE_THREAD | {"XDG_RUNTIME_DIR": str(folder / "run")},
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        assert start(FRONT, "keys", "new", "keys").wait(START_LIMIT_S) == 0
        serve = start(FRONT, "serve", "deployment.yaml", "--port", "0")
        url = ready_url(serve)
        workers = {
            role: start(role, "worker", "--role", role, *_WORKER, "deployment.yaml")
            for role in _ROLES
        }
        made = Apart(Server(serve, url), folder, net, workers)
        try:
            yield made
        finally:
            serve.send_signal(signal.SIGINT)
            for name, process in {"the deployment": serve, **workers}.items():
                try:
                    if (code := process.wait(2 * STOP_LIMIT_S)) != 0:
                        left.append(f"{name} ended with {code}")
                except subprocess.TimeoutExpired:
                    left.append(f"{name} did not end within {2 * STOP_LIMIT_S:.0f} s")
        left += [f"left running: {line}" for line in processes_of(folder)]
        left += [f"left in the run folder: {path}" for path in files(folder / "run")]
        left += [f"left in /dev/shm: {path}" for path in made.shared if path.exists()]
