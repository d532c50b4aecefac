"""Stands in for ``python -m pdserve.cli``: prepare, router and workers of a few lines each.

They tie themselves to the supervisor and talk over the run folder as the real ones do, and
write what befalls them to the file ``$STORY``. ``$FAULT`` makes one of them fail.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from pdserve.cli import _parser  # the real command line, so that what serve says is checked
from pdserve.core import config
from pdserve.core.card import ModelCard
from pdserve.core.orphans import die_with_parent
from pdserve.core.supervised import ALL_END, up
from pdserve.deploy.devices import Devices

FAULT = os.environ.get("FAULT", "")


def tell(text: str) -> None:
    with Path(os.environ["STORY"]).open("a") as story:
        story.write(text + "\n")


def fail(sentence: str, code: int) -> None:
    print(f"pdserve: {sentence}", file=sys.stderr)
    sys.exit(code)


def until_terminated(name: str) -> None:
    """Waits for the signal that ends the whole deployment, and takes a little to end."""
    end = threading.Event()
    number = ALL_END if name == "router" else signal.SIGTERM
    signal.signal(number, lambda *_: end.set())
    tell(f"{name} is up, pid {os.getpid()}")
    up()
    while not end.wait(0.05):
        pass
    if FAULT == "stubborn":
        tell(f"{name} is stubborn")
        time.sleep(600)
    tell(f"{name} ended")


def prepare(card: Path, devices: Path) -> None:
    if FAULT == "slow prepare":
        tell("preparing")
        time.sleep(600)
    if FAULT == "no weights":
        fail("model.path: found 'm', which does not exist", 2)
    if FAULT == "prepare dies":
        os.abort()
    model = ModelCard("m", "/nowhere", "f", "llama", 10, 10, (1,))
    model.save(card)
    Devices(num_gpus=0, num_cores=2).save(devices)


def router(deployment: config.Deployment, run_dir: Path) -> None:
    if FAULT == "port taken":
        fail("router.port: 127.0.0.1:8000 is taken; give another", 1)
    pools = deployment.pools
    wanted = pools.num_workers

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            joined = [path.name.removeprefix("joined-") for path in run_dir.glob("joined-*")]
            ready = len(joined) >= wanted
            blocks = {"total": 1, "free": 1, "cached": 0, "held": 0}
            counts = {"pid": 1, "running": 0, "waiting": 0, "blocks": blocks}
            workers = [
                {"id": name, "role": name.split("-")[0], "state": "ready", **counts}
                for name in joined
            ]
            body = {"policy": "adaptive", "workers": workers} if self.path == "/cluster" else {}
            self.send_response(200 if ready or self.path == "/cluster" else 503)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", deployment.router.port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    written = run_dir / "http.json.new"
    written.write_text(json.dumps({"host": host, "port": port}))
    written.rename(run_dir / "http.json")
    until_terminated("router")


def worker(name: str, join: str) -> None:
    run_dir = Path(join.removeprefix("ipc://")).parent
    assert run_dir.is_dir()
    if f"{name} out of memory" == FAULT:
        fail("kv.memory: 5GiB do not fit", 1)
    (run_dir / f"joined-{name}").touch()
    until_terminated(name)


def main() -> None:
    arguments = _parser().parse_args()
    assert arguments.parent == os.getppid()
    die_with_parent(arguments.parent)
    deployment = config.load(arguments.file)
    command = sys.argv[1]
    if command == "prepare":
        prepare(arguments.card, arguments.devices)
    elif command == "router":
        assert ModelCard.read(arguments.card).name == "m"
        router(deployment, arguments.run_dir)
    else:
        assert os.environ["OMP_NUM_THREADS"] == str(arguments.threads)
        worker(arguments.id, arguments.join)


main()
