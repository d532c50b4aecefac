"""The KV pool: how large it is made, and its blocks as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import Answers, launch, new, random_prompt

from pdserve.core.config import TransferSection
from pdserve.core.errors import OutOfMemory
from pdserve.core.ids import Medium
from pdserve.core.plan import KvLayout, Row
from pdserve.engine import kv
from pdserve.engine.device import MemoryState
from pdserve.engine.presets import PRESETS
from pdserve.engine.shape import parse_shape

GIB = 1 << 30
LLAMA = parse_shape(PRESETS["llama-3.1-8b"], "x")


def planned(**changes: Any) -> KvLayout:
    given: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "block_size": 16,
        "max_context": 8192,
        "memory": "auto",
        "on_gpu": True,
        "state": MemoryState(141 * GIB, 120 * GIB),
        "memory_share": 1.0,
        "weight_bytes": 15 * GIB,
        "workspace_bytes": 3 * GIB,
    }
    return kv.plan_layout(LLAMA, **{**given, **changes})


def test_a_block_of_an_8b_llama_is_two_mib() -> None:
    assert planned().block_bytes == 2 << 20
    assert planned().dtype == "bf16"


@pytest.mark.parametrize(
    ("changes", "gib"),
    [
        ({}, 141 * 0.85 - 18),
        ({"memory": 0.5}, 141 * 0.5 - 18),
        ({"memory": 0.5, "memory_share": 0.5}, 141 * 0.25 - 18),
        ({"memory": "10GiB"}, 10),
        ({"memory": "10GiB", "memory_share": 0.5}, 5),
        ({"state": MemoryState(141 * GIB, 40 * GIB)}, 40 * 0.95 - 3),
        ({"on_gpu": False}, 8),  # eight sequences of the longest length
        ({"on_gpu": False, "max_context": 32768}, 14.1),  # a tenth of the memory
        ({"on_gpu": False, "max_context": 32768, "memory_share": 0.25}, 4),  # one sequence
    ],
)
def test_sizes(changes: dict[str, Any], gib: float) -> None:
    layout = planned(**changes)
    assert layout.num_blocks * layout.block_bytes / GIB == pytest.approx(gib, rel=1e-3)


@pytest.mark.parametrize(
    "changes", [{"memory": 0.1}, {"memory": "1000MiB"}, {"state": MemoryState(141 * GIB, GIB)}]
)
def test_no_room_for_one_sequence(changes: dict[str, Any]) -> None:
    with pytest.raises(OutOfMemory) as caught:
        planned(**changes)
    assert "raise kv.memory, or lower model.max_context" in str(caught.value)


def test_a_size_that_is_not_free_is_said_and_not_cut() -> None:
    with pytest.raises(OutOfMemory) as caught:
        planned(memory="512GiB", memory_share=0.5)
    assert str(caught.value) == (
        "kv.memory: 512GiB is 256.00 GiB for this worker, and 111.00 GiB of its device are free; "
        "ask for less"
    )


def test_the_context_that_would_fit_is_named() -> None:
    with pytest.raises(OutOfMemory, match=r"lower model\.max_context to 8000$"):
        planned(memory="1000MiB")


def test_blocks_go_from_pool_to_pool(llama_folder: Path, answers: Answers) -> None:
    """Prefill in one engine, the bytes into the other, decode there."""
    source, target = (tiny_models.engine_of(llama_folder) for _ in range(2))
    assert source.kv.layout == target.kv.layout
    prompt = random_prompt(45, seed=20)
    wanted = answers.greedy(prompt, 8)
    mine, theirs = (11, 3, 8), (5, 6, 2)
    tokens = launch(source, new(0, prompt, mine), Row(0, 0, 45))

    views = source.kv.read(mine)
    assert [view.nbytes for view in views] == [source.kv.layout.block_bytes] * 3
    target.kv.write(theirs, [memoryview(bytes(view)) for view in views])
    tokens += launch(target, new(4, [*prompt, *tokens], theirs), Row(4, 45, 1))
    for step in range(6):
        tokens += launch(target, None, Row(4, 46 + step, 1, (9,) if step == 2 else ()))
    assert tokens == wanted


def test_a_view_is_the_pool_itself(llama_folder: Path) -> None:
    engine = tiny_models.engine_of(llama_folder)
    launch(engine, new(0, random_prompt(3, seed=1), (2,)), Row(0, 0, 3))
    (before,) = engine.kv.read([2])
    copied = bytes(before)
    engine.kv.write([2], [memoryview(bytes(len(copied)))])
    assert copied != bytes(before) == bytes(len(copied))


def test_a_tail_is_zeroed_in_every_layer() -> None:
    layout = KvLayout(3, 2, 2, 4, 8, "fp32", 2 * 2 * 2 * 4 * 8 * 4)
    pool = kv.new_pool(
        layout, torch.float32, torch.device("cpu"), TransferSection(medium=Medium.TCP)
    )
    blocks = pool.blocks
    assert not blocks.any(), "a new pool is zero"
    blocks.fill_(7)
    pool.zero_tail(1, 3)
    assert not blocks[1, :, :, :, 3:].any()
    blocks[1, :, :, :, 3:] = 7
    assert bool((blocks == 7).all()), "and nothing else is"
    pool.zero_tail(1, 4)
    assert bool((blocks == 7).all())


def test_frames_that_do_not_match_are_a_bug(llama_folder: Path) -> None:
    pool = tiny_models.engine_of(llama_folder).kv
    with pytest.raises(AssertionError):
        pool.write([0], [memoryview(bytes(pool.layout.block_bytes - 4))])
