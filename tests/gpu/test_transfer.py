"""KV blocks between processes that share a GPU, and between GPUs: CUDA IPC, and through tcp.

The deaths (``test_a_death_gives_everything_back``) have run over shared memory on a CPU, and not
yet on a GPU.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pdserve.bench import transfer_floors
from pdserve.bench.transfer import layout_of
from pdserve.bench.transfer_pair import DECODE, PREFILL, Pair, Request, specs_of
from pdserve.bench.transfer_worker import MAX_CONTEXT, VOCABULARY, WorkerSpec, deployment_of
from pdserve.core.card import ModelCard
from pdserve.core.ids import Medium, Role

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.timeout(600),
]
_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
where = pytest.mark.parametrize(
    "devices",
    [
        pytest.param(("cuda:0", "cuda:0"), id="one"),
        pytest.param(("cuda:0", "cuda:1"), id="two", marks=_two_gpus),
    ],
)


@contextmanager
def pair_of(
    folder: Path, devices: tuple[str, str], medium: str, token_us: float = 0.0
) -> Iterator[Pair]:
    deployment_of(folder, medium=medium, lease_s=4.0)
    card = ModelCard("none", "none", secrets.token_hex(32), "none", VOCABULARY, MAX_CONTEXT, ())
    card.save(folder / "card.json")
    template = WorkerSpec(
        worker_id="",
        role=Role.PREFILL,
        join=f"ipc://{folder}/control.sock",
        device="",
        deployment=str(folder / "deployment.json"),
        card=str(folder / "card.json"),
        layout=layout_of("smollm2-135m", 4096),
        chunk_tokens=512,
        token_us=token_us,
    )
    with Pair(folder, specs_of(template, devices)) as pair:
        yield pair


@where
def test_a_mapped_pool_is_copied_from(devices: tuple[str, str]) -> None:
    """Each block that was copied is the one that was named; ``pull`` asserts it."""
    layout = layout_of("llama-3.1-8b", 2048)
    rows = transfer_floors.pull(layout, devices, Medium.CUDA_IPC, (1, 32, 128))
    assert len(rows) == 6 and all(row["gb_s"] > 1 for row in rows)


@where
@pytest.mark.parametrize("medium", ["auto", "tcp"])
def test_what_d_holds_is_what_p_sent(devices: tuple[str, str], medium: str, tmp_path: Path) -> None:
    used = Medium.CUDA_IPC if medium == "auto" else Medium.TCP
    with pair_of(tmp_path, devices, medium) as pair:
        for num_tokens in (16, 2000, 4096):
            done = pair.transfer(num_tokens, verify=True).done
            assert done is not None and done.medium is used


def begin(pair: Pair, moment: str, num_tokens: int) -> Request:
    """A request that has just come to this moment of its life."""
    if moment in ("begun", "held"):
        pair.pause(DECODE)  # it grants nothing
    max_tokens = 1 << 14 if moment == "running" else 2
    request = pair.begin(num_tokens, max_tokens=max_tokens, may_fail=True)
    reached = {
        "begun": lambda: request.started,
        "moving": lambda: request.started,
        "held": lambda: 0 in request.tokens,
        "running": lambda: len(request.times) > 8,
    }
    pair.until(reached[moment])
    if moment == "moving":
        pair.listen(0.5)  # chunks go over while others are computed
        assert 0 not in request.tokens
    return request


# whose death the other one notices by itself; else the router ends what is left
NOTICED = {("moving", PREFILL), ("moving", DECODE), ("begun", DECODE), ("held", DECODE)}


@where
@pytest.mark.parametrize("victim", [PREFILL, DECODE])
@pytest.mark.parametrize("moment", ["begun", "moving", "held", "running"])
def test_a_death_gives_everything_back(
    devices: tuple[str, str], moment: str, victim: str, tmp_path: Path
) -> None:
    """D has mapped P's pool, which pins it. Whoever is killed, and whenever: the other one lets
    go of all blocks, the dead one's memory is free before it comes back, and all is as before."""
    survivor = DECODE if victim == PREFILL else PREFILL
    device = torch.device(devices[0] if victim == PREFILL else devices[1])
    pool_bytes = layout_of("smollm2-135m", 4096).num_blocks * 737_280
    torch.cuda.mem_get_info(device)
    with pair_of(tmp_path, devices, "cuda_ipc", 400.0 if moment == "moving" else 0.0) as pair:
        pair.transfer(4096, verify=True)
        (with_victim, _) = torch.cuda.mem_get_info(device)
        request = begin(pair, moment, 4096)
        pair.kill(victim)
        pair.blocks.clear()
        if moment in ("begun", "held") and survivor == DECODE:
            pair.resume(DECODE)
        if (moment, victim) in NOTICED:
            pair.until(lambda: request.failed.startswith(survivor), limit_s=60)
        pair.end(request)
        pair.until(lambda: survivor in pair.blocks and pair.blocks[survivor].held == 0, limit_s=60)
        end = time.monotonic() + 30
        while torch.cuda.mem_get_info(device)[0] < with_victim + pool_bytes:
            assert time.monotonic() < end, f"the pool of {victim} is still mapped"
            pair.listen(0.1)
        pair.start(victim)
        done = pair.transfer(4096, verify=True).done
        assert done is not None and done.medium is Medium.CUDA_IPC
        assert {link.worker_id for link in pair.links} <= {DECODE}
