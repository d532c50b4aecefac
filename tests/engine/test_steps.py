"""How a plan becomes arrays, and the padded decode step that a GPU captures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import GREEDY, launch, new, random_prompt

from pdserve.core.plan import NewSequence, Row, StepPlan
from pdserve.engine.batch import SingleRows, describe, padded
from pdserve.engine.graphs import decode_step, ladder
from pdserve.engine.slots import SlotTable
from pdserve.engine.upload import pack_into, unpack, uploader

CPU = torch.device("cpu")


def table_of(max_slots: int = 4, max_context: int = 40) -> SlotTable:
    return SlotTable(
        max_slots=max_slots,
        max_context=max_context,
        block_size=8,
        num_blocks=50,
        vocab_size=100,
        upload=uploader(CPU),
        device=CPU,
    )


def sequence(slot: int, length: int, *blocks: int) -> NewSequence:
    return NewSequence(slot, tuple(range(length)), length, GREEDY, blocks)


def test_single_rows_come_before_chunks_and_results_in_the_plans_order() -> None:
    table = table_of()
    plan = StepPlan(
        (sequence(0, 12, 5, 9), sequence(1, 20, 7, 2, 3), sequence(2, 1, 30)),
        (Row(0, 11, 1), Row(1, 6, 4, sample=False), Row(2, 0, 1)),
    )
    table.apply(plan)
    batch = describe(plan, table)
    assert batch.singles.slots.tolist() == [0, 2]
    assert batch.singles.token_index.tolist() == [11, 2 * 41]
    assert batch.singles.cache_slots.tolist() == [9 * 8 + 3, 30 * 8]
    assert batch.singles.context_lens.tolist() == [12, 1]
    assert batch.chunks.slots.tolist() == [1]
    assert batch.chunks.positions.tolist() == [6, 7, 8, 9]
    assert batch.chunks.cache_slots.tolist() == [62, 63, 16, 17]
    assert (batch.chunks.new_lens, batch.chunks.context_lens) == ((4,), (10,))
    assert batch.sampled.slots == (0, 2)
    assert batch.sampled.at.tolist() == [0, 1]
    assert batch.sampled.written_to.tolist() == [12, 2 * 41 + 1]
    assert not batch.all_sampled

    after = StepPlan((), (Row(1, 10, 9), Row(0, 12, 4, new_blocks=(40,))))
    table.apply(after)
    second = describe(after, table)
    assert second.sampled.at.tolist() == [8, 12]
    assert second.chunks.positions.tolist() == [*range(10, 19), 12, 13, 14, 15]
    assert second.chunks.cache_slots[9:].tolist() == [9 * 8 + 4 + n for n in range(4)]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (StepPlan((sequence(0, 12, 5),), (Row(0, 8, 1),)), "no block for it"),
        (StepPlan((sequence(0, 40, *range(6)),), (Row(0, 40, 1),)), "past the context"),
        (StepPlan((sequence(0, 2, 99),), (Row(0, 0, 2),)), "past the pool"),
        (StepPlan((sequence(0, 2, 1),), (Row(0, 0, 1), Row(0, 1, 1))), "two rows"),
        (StepPlan((sequence(4, 2, 1),), (Row(4, 0, 1),)), "num_tokens=1"),
    ],
)
def test_a_plan_that_breaks_the_contract_is_caught(plan: StepPlan, words: str) -> None:
    table = table_of()
    with pytest.raises(AssertionError, match=words):
        table.apply(plan)
        describe(plan, table)


def test_a_token_past_the_vocabulary_is_caught() -> None:
    with pytest.raises(AssertionError, match="past the vocabulary"):
        table_of().apply(StepPlan((NewSequence(0, (100,), 1, GREEDY, (0,)),), ()))


def test_packing() -> None:
    arrays = [
        np.array([1, -2, 3], np.int64),
        np.array([7], np.int32),
        np.empty(0, np.float32),
        np.array([[0.5, 2.0]], np.float32),
    ]
    buffer = torch.zeros(80, dtype=torch.uint8)
    pack_into(buffer.numpy(), arrays)
    views = unpack(buffer, arrays)
    for view, array in zip(views, arrays, strict=True):
        assert torch.equal(view, torch.from_numpy(array))
        assert view.dtype == torch.from_numpy(array).dtype
    assert views[0].untyped_storage().data_ptr() == buffer.data_ptr()


def test_the_ladder_wastes_little() -> None:
    for most in (1, 2, 7, 64, 100, 256, 320, 600):
        sizes = ladder(most)
        assert sizes[-1] == most and list(sizes) == sorted(set(sizes))
        for rows in range(8, min(most, 512)):
            size = next(size for size in sizes if size >= rows)
            assert size - rows < max(8, rows / 4)


def test_a_padded_decode_step_equals_one_without_padding(llama_folder: Path) -> None:
    """What a graph captures, run on the CPU: padding rows change nothing."""
    engine = tiny_models.engine_of(llama_folder)
    table, model = engine._table, engine._model
    for slot, length in ((0, 5), (3, 33), (6, 16)):
        launch(
            engine,
            new(slot, random_prompt(length, seed=slot), (slot, slot + 20, slot + 40)),
            Row(slot, 0, length),
        )
    plan = StepPlan((), (Row(0, 5, 1), Row(3, 33, 1), Row(6, 16, 1)))
    with torch.inference_mode():
        rows = describe(plan, table).singles
        cache = [bytes(view) for view in engine.kv.read(range(64))]
        wide = padded(rows, 8, table)
        assert len(wide) == 8 and wide.context_lens[3:].tolist() == [0] * 5
        arrays = [torch.from_numpy(array) for array in wide.arrays]
        logits = torch.full((8, tiny_models.VOCAB), torch.nan)
        decode_step(model, table, arrays, engine._workspace, logits)
        written = [bytes(view) for view in engine.kv.read(range(64))]
        changed = [n for n, (one, two) in enumerate(zip(cache, written, strict=True)) if one != two]
        assert changed == [0, 26, 43]
        eager = engine._run(describe(plan, table))
    assert torch.allclose(logits[:3], eager, atol=1e-5)
    assert logits[3:].isfinite().all()
    assert len(SingleRows.none()) == 0
