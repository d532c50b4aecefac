"""Which room may know which: read from the source, and tried in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import sources

import pdserve

_PHASE = {"core", "cache", "kvtransfer"}
ALLOWED = {
    "core": set[str](),
    "kernels": set[str](),
    "cache": {"core"},
    "kvtransfer": {"core"},
    "engine": {"core", "kernels"},
    "prefill": _PHASE,
    "decode": _PHASE,
    "simulation": _PHASE | {"prefill", "decode", "router"},
    "worker": _PHASE | {"prefill", "decode", "engine", "simulation"},
    "router": {"core", "cache"},
    "deploy": {"core"},
    "bench": {"cache", "core", "engine", "kernels", "router", "simulation", "worker"},
}
NO_TORCH = ("core", "cache", "kvtransfer", "prefill", "decode", "simulation", "router", "deploy")
TENSOR_LIBRARIES = {"torch", "triton", "transformers", "safetensors", "accelerate", "gguf"}


def test_every_room_has_a_rule() -> None:
    assert set(sources.rooms()) == set(ALLOWED)


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_what_it_may(room: str) -> None:
    wrong = [
        str(found)
        for found in sources.imports(room)
        if found.target_room not in {None, room, *ALLOWED[room]}
    ]
    assert wrong == []


def test_no_rooms_import_each_other_in_a_circle() -> None:
    graph = {
        room: {found.target_room for found in sources.imports(room)} - {None, room}
        for room in sources.rooms()
    }
    order = list(TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert order.index("core") < order.index("worker")


def test_the_rules_allow_no_circle() -> None:
    assert len(list(TopologicalSorter(ALLOWED).static_order())) == len(ALLOWED)


@pytest.mark.parametrize("room", NO_TORCH)
def test_no_tensor_library_in_the_source(room: str) -> None:
    assert [str(i) for i in sources.imports(room) if i.top in TENSOR_LIBRARIES] == []


@pytest.mark.parametrize("room", [*NO_TORCH, "worker", ""])
def test_torch_does_not_come_in_by_the_back_door(room: str) -> None:
    names = [sources.module_name(path) for path in sources.modules(room)]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(pdserve.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_imports_are_read_rightly() -> None:
    found = {(i.path.name, i.target) for i in sources.imports("deploy")}
    assert ("local.py", "pdserve.core.config.Deployment") in found
    assert ("local.py", "pdserve.core.config") in found
    assert ("local.py", "pdserve.deploy.fetch") in found
    assert ("local.py", "asyncio") in found
