"""KV blocks between processes that share a GPU, and between GPUs: CUDA IPC, and through tcp."""

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
from pdserve.bench.transfer_pair import DECODE, PREFILL, Pair, specs_of
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
def pair_of(folder: Path, devices: tuple[str, str], medium: str) -> Iterator[Pair]:
    deployment_of(folder, medium=medium)
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
        token_us=0.0,
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


@where
def test_the_memory_of_a_dead_peer_is_free_before_it_comes_back(
    devices: tuple[str, str], tmp_path: Path
) -> None:
    """D has mapped P's pool, which pins it. P is killed: D lets go by itself, and soon."""
    device = torch.device(devices[0])
    torch.cuda.mem_get_info(device)
    with pair_of(tmp_path, devices, "cuda_ipc") as pair:
        pair.transfer(4096, verify=True)
        (with_p, _) = torch.cuda.mem_get_info(device)
        pool_bytes = layout_of("smollm2-135m", 4096).num_blocks * 737_280
        pair.kill(PREFILL)
        end = time.monotonic() + 5.0
        while torch.cuda.mem_get_info(device)[0] < with_p + pool_bytes:
            assert time.monotonic() < end, "the dead worker's pool is still mapped"
            time.sleep(0.05)
        pair.start(PREFILL)
        pair.transfer(4096, verify=True)
        assert {link.worker_id for link in pair.links} <= {DECODE}
