"""How a plan becomes arrays, and the padded decode step that a GPU captures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import GREEDY, launch, new, random_prompt

from pdserve.core.plan import NewSequence, Row, StepPlan
from pdserve.engine.batch import Batch, ChunkRows, SingleRows, describe, padded, token_arrays
from pdserve.engine.chunk_graphs import chunk_sizes, fitting
from pdserve.engine.graphs import decode_step, ladder
from pdserve.engine.model import Attention, Tokens
from pdserve.engine.slots import SlotTable
from pdserve.engine.upload import pack_into, unpack, uploader
from pdserve.engine.warm_up import warm_up_plans
from pdserve.engine.whole_graphs import Kind, kind_of, step_arrays
from pdserve.kernels.prefill_attention import PrefillBatch

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


def test_a_step_in_pieces_equals_a_whole_one(llama_folder: Path) -> None:
    """What is captured around attention, run on the CPU in padded buffers of NaN."""
    engine = tiny_models.engine_of(llama_folder)
    table, model, shape = engine._table, engine._model, engine.shape
    launch(engine, new(0, random_prompt(5, seed=1), (0, 20)), Row(0, 0, 5))
    chunk = new(3, random_prompt(33, seed=2), (3, 23, 43))
    plan = StepPlan((chunk,), (Row(0, 5, 1), Row(3, 0, 33)))
    with torch.inference_mode():
        table.apply(plan)
        batch = describe(plan, table)
        attention, at = engine._attention(batch)
        index, positions, slots = map(torch.from_numpy, token_arrays(batch, 64, table))
        assert slots[34:].tolist() == [-1] * 30
        tokens = Tokens(table.token_ids.view(-1)[index], positions, slots)
        qkv, attended, left = (
            torch.full((64, width), torch.nan)
            for width in (
                shape.qkv_width,
                shape.num_q_heads * shape.head_dim,
                shape.hidden_size,
            )
        )
        mine = attended[:34].view(34, shape.num_q_heads, shape.head_dim)
        heads, residual = model.enter(tokens, qkv)
        for layer in range(shape.num_layers - 1):
            model.attend(layer, tiny_models.first(heads, 34), attention, mine)
            heads, residual = model.cross(layer, attended, residual, tokens, qkv)
        model.attend(shape.num_layers - 1, tiny_models.first(heads, 34), attention, mine)
        model.leave(attended, residual, left)
        assert at is not None
        found = model.final_norm(left.index_select(0, at))
        whole = token_arrays(batch, batch.num_tokens, table)
        index, positions, slots = map(torch.from_numpy, whole)
        tokens = Tokens(table.token_ids.view(-1)[index], positions, slots)
        assert torch.allclose(found, model.hidden(tokens, attention, at), atol=1e-5)
    assert Batch.none().num_tokens == 0


def test_a_step_takes_the_next_size_or_its_own() -> None:
    sizes = chunk_sizes(2304, worth=900)
    assert sizes == (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 2048)
    assert [fitting(sizes, 900, count) for count in (1, 64, 65, 513, 896)] == [
        64,
        64,
        128,
        640,
        896,
    ]
    # Beyond what is worth its padding, a step has to fit exactly.
    assert [fitting(sizes, 900, count) for count in (1000, 1024, 2047, 2048, 2100)] == [
        None,
        1024,
        None,
        2048,
        None,
    ]
    assert chunk_sizes(40, worth=900) == ()
    assert fitting((), 900, 10) is None


@pytest.mark.parametrize("most", [8, 33, 128, 2304])
def test_warm_up_stays_within_the_engines_limits(most: int) -> None:
    plans = list(warm_up_plans(most, max_context=1024, pool_tokens=640, block_size=16))
    for plan in plans:
        assert plan.num_tokens <= most
        for sequence in plan.new:
            assert len(sequence.token_ids) <= 1024
            assert max(sequence.block_table) < 40
    assert any(len(plan.rows) == 2 for plan in plans) == (most > 64)


def test_a_whole_step_equals_its_parts(llama_folder: Path) -> None:
    """What one graph captures, run on the CPU: rows and chunks lie where the arrays say, and
    room for more of either changes nothing."""
    engine = tiny_models.engine_of(llama_folder)
    table, model, shape = engine._table, engine._model, engine.shape
    for slot, length in ((0, 5), (6, 40), (2, 17)):
        blocks = (slot, slot + 20, slot + 40)
        launch(engine, new(slot, random_prompt(length, seed=slot), blocks), Row(slot, 0, length))
    longer = new(6, random_prompt(45, seed=6), (6, 26, 46))
    fresh = new(3, random_prompt(20, seed=3), (3, 23))
    rows = (Row(0, 5, 1), Row(2, 17, 1), Row(6, 16, 29), Row(3, 0, 20))
    with torch.inference_mode():
        table.apply(StepPlan((longer, fresh), rows))
        batch = describe(StepPlan((), rows), table)
        assert kind_of(batch, 64, 1024) is Kind.BESIDE
        arrays = step_arrays(batch, 64, 7, table)
        index, positions, cache_slots, slots, lens, chunk_slots, bounds = map(
            torch.from_numpy, arrays
        )
        assert lens.tolist() == [6, 18, 0, 0, 0, 0, 0]
        assert bounds.tolist() == [[2, 31, 51, 51, 51], [0, 45, 65, 65, 65]]
        assert chunk_slots[:2].tolist() == [6, 3]
        engine._workspace.prepare(table.block_tables[slots], lens)
        chunks = PrefillBatch(
            *(table.block_tables[chunk_slots], (29, 20), (45, 20)),
            tuple(bounds[0].tolist()),
            bounds,
            placed=True,
        )
        tokens = Tokens(table.token_ids.view(-1)[index], positions, cache_slots)
        left = torch.full((64, shape.hidden_size), torch.nan)
        model.pass_through(tokens, Attention(7, engine._workspace, chunks), left)
        found = model.final_norm(left[torch.from_numpy(batch.sampled.at)])
        attention, at = engine._attention(batch)
        index, positions, cache_slots = map(torch.from_numpy, token_arrays(batch, 51, table))
        tokens = Tokens(table.token_ids.view(-1)[index], positions, cache_slots)
        assert torch.allclose(found, model.hidden(tokens, attention, at), atol=1e-5)


def test_what_one_graph_holds() -> None:
    def batch(singles: int, *chunks: tuple[int, int]) -> Batch:
        rows = np.zeros(singles, np.int64)
        return Batch(
            SingleRows(rows, rows, rows, rows, np.ones(singles, np.int32)),
            ChunkRows(
                *(rows,) * 3,
                np.zeros(len(chunks), np.int64),
                tuple(count for count, _ in chunks),
                tuple(context for _, context in chunks),
            ),
            Batch.none().sampled,
        )

    def kind(size: int, *parts: int | tuple[int, int]) -> Kind | None:
        singles, *chunks = parts
        return kind_of(batch(singles, *chunks), size, most_context=16384)

    assert kind(64, 3) is None
    assert kind(128, 3, *[(16, 16)] * 4) is Kind.BESIDE
    assert kind(128, 3, *[(16, 16)] * 5) is None
    assert kind(1280, 3, (1200, 1200)) is None, "the GPU takes longer than the launches"
    assert kind(512, 0, (500, 500)) is Kind.SHORT
    assert kind(1024, 0, (1000, 1000)) is None
    assert kind(512, 0, (500, 16384)) is Kind.BEHIND
    assert kind(2048, 0, (2048, 9000)) is Kind.BEHIND
    assert kind(512, 0, (500, 16385)) is Kind.SHORT
    assert kind(192, 0, (190, 900)) is Kind.SHORT, "longer contexts are not gathered"
    assert kind(1024, 0, (1000, 16385)) is None
    assert kind(256, 0, (64, 900), (150, 900)) is Kind.SHORT
    assert kind_of(batch(0, (512, 512)), 512, most_context=512) is Kind.SHORT
