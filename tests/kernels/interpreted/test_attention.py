"""Both attentions in Triton against float64; the pool is NaN wherever they must not look."""

from __future__ import annotations

import pytest
import torch

from pdserve.bench.kernel_cases import Chunks, PagedContexts, relative_error
from pdserve.kernels.gpu import ragged_attention
from pdserve.kernels.gpu.decode_attention import DecodeTuning, SplitWorkspace, decode_attention
from pdserve.kernels.gpu.gather_contexts import gather_contexts
from pdserve.kernels.gpu.prefill_attention import PrefillPath, choose
from pdserve.kernels.gpu.ragged_attention import RaggedTuning, dense_attention, paged_attention
from pdserve.kernels.prefill_attention import PrefillBatch

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
SCALE = 0.11


def _split(
    contexts: PagedContexts, num_q_heads: int, max_batch: int, tuning: DecodeTuning
) -> SplitWorkspace:
    workspace = SplitWorkspace(
        max_batch=max_batch,
        num_q_heads=num_q_heads,
        num_kv_heads=contexts.pool.shape[3],
        head_dim=contexts.pool.shape[5],
        dtype=contexts.pool.dtype,
        device=torch.device("cpu"),
        tuning=tuning,
    )
    workspace.prepare(contexts.block_tables, contexts.context_lens_tensor)
    return workspace


@pytest.mark.parametrize(
    ("group", "num_kv_heads", "head_dim", "context_lens", "block_n", "dtype"),
    [
        (1, 2, 80, (33,), 16, torch.float32),
        (3, 3, 64, (5, 0, 100, 1), 16, torch.float32),
        (3, 1, 64, (0, 70, 129), 32, torch.float16),
        (4, 2, 128, (64, 17), 32, torch.float16),
        (7, 1, 96, (0,), 16, torch.float32),
        (7, 1, 96, (31,), 64, torch.float32),
        (8, 1, 256, (16, 15), 16, torch.float32),
        (2, 1, 80, (40, 0, 3, 16, 70, 1, 1, 1, 9), 16, torch.float32),
    ],
)
def test_decode(
    group: int,
    num_kv_heads: int,
    head_dim: int,
    context_lens: tuple[int, ...],
    block_n: int,
    dtype: torch.dtype,
) -> None:
    contexts = PagedContexts.create(
        context_lens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        spread=2,
        poisoned_tails=True,
    )
    num_q_heads = group * num_kv_heads
    q = torch.randn(len(context_lens), num_q_heads + 2, head_dim).to(dtype)[:, 1:-1]
    exact = contexts.exact_decode(q, SCALE)
    # Eight multiprocessors: many pieces a row, and one.
    for programs in (1, 8):
        tuning = DecodeTuning(block_n=block_n, programs=programs)
        workspace = _split(contexts, num_q_heads, 9, tuning)
        out = decode_attention(q, contexts.kv_layer, SCALE, workspace)
        assert relative_error(out, exact) < TOLERANCE[dtype]
        assert not out[[length == 0 for length in context_lens]].any()


@pytest.mark.parametrize("context_lens", [(1,), (0, 0, 0), (500, 1, 0, 77), (64,) * 9, (1000,)])
@pytest.mark.parametrize("programs", [1, 3, 16])
def test_the_plan_covers_each_context_once(context_lens: tuple[int, ...], programs: int) -> None:
    contexts = PagedContexts.create(
        context_lens, num_kv_heads=1, head_dim=8, dtype=torch.float32, num_layers=1
    )
    plan = _split(contexts, 1, 9, DecodeTuning(block_n=16, programs=programs))
    first = plan.first_piece.tolist()
    batch = len(context_lens)
    assert first[0] == 0
    assert first[batch] <= plan.wanted_pieces + batch
    for row, length in enumerate(context_lens):
        count = first[row + 1] - first[row]
        size = int(plan.piece_lens[row])
        assert plan.rows[first[row] : first[row + 1]].tolist() == [row] * count
        assert size % 16 == 0
        assert count == -(-length // size) if length else count == 0


@pytest.mark.parametrize(
    ("group", "num_kv_heads", "head_dim", "new_lens", "context_lens", "dtype"),
    [
        (1, 2, 80, (33,), (33,), torch.float32),
        (3, 2, 64, (5, 40, 1), (5, 100, 33), torch.float32),
        (4, 1, 128, (17, 16), (40, 16), torch.float16),
        (7, 1, 96, (9,), (25,), torch.float32),
        (8, 1, 256, (6,), (22,), torch.float32),
    ],
)
def test_prefill(
    group: int,
    num_kv_heads: int,
    head_dim: int,
    new_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    contexts = PagedContexts.create(
        context_lens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        spread=2,
        poisoned_tails=True,
    )
    chunks = Chunks.create(new_lens, contexts, num_q_heads=group * num_kv_heads)
    exact = chunks.exact(SCALE)
    tuning = RaggedTuning(block_m=32, block_n=16)
    out = paged_attention(chunks.q, contexts.kv_layer, SCALE, chunks.batch, tuning=tuning)
    assert relative_error(out, exact) < TOLERANCE[dtype]

    k, v = gather_contexts(contexts.kv_layer, chunks.batch)
    for part, index in ((k, 0), (v, 1)):
        rows = [contexts.keys_values(row)[index] for row in range(len(new_lens))]
        assert torch.equal(part, torch.cat(rows))
    out = dense_attention(chunks.q, k, v, SCALE, chunks.batch, tuning=tuning)
    assert relative_error(out, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("splits", [2, 8])
@pytest.mark.parametrize(
    ("new_lens", "context_lens"),
    [
        ((9,), (200,)),
        ((20,), (20,)),  # the last piece lies behind most queries
        ((3, 1, 17), (90, 1, 33)),  # rows of several pieces and of one
    ],
)
def test_keys_divided_among_programs(
    splits: int,
    new_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ragged_attention, "_LEAST_PIECE", 16)
    contexts = PagedContexts.create(
        context_lens, num_kv_heads=2, head_dim=80, dtype=torch.float32, poisoned_tails=True
    )
    chunks = Chunks.create(new_lens, contexts, num_q_heads=6)
    exact = chunks.exact(SCALE)
    tuning = RaggedTuning(block_m=32, block_n=16)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote is NaN
    try:
        paged = paged_attention(
            chunks.q, contexts.kv_layer, SCALE, chunks.batch, tuning=tuning, splits=splits
        )
        k, v = gather_contexts(contexts.kv_layer, chunks.batch)
        dense = dense_attention(chunks.q, k, v, SCALE, chunks.batch, tuning=tuning, splits=splits)
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative_error(paged, exact) < TOLERANCE[torch.float32]
    assert relative_error(dense, exact) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("length", [37, 128, 199])
def test_what_is_launched_for_a_long_row_serves_a_short_one(length: int) -> None:
    """As a captured graph does; memory that nobody wrote is NaN."""
    contexts = PagedContexts.create(
        (length,), num_kv_heads=2, head_dim=64, dtype=torch.float32, poisoned_tails=True
    )
    chunks = Chunks.create((9,), contexts, num_q_heads=4)
    most = PrefillBatch.captured(contexts.block_tables, chunks.batch.bounds, 16, 200)
    wide = torch.cat((chunks.q, torch.full((7, 4, 64), torch.nan)))
    torch.use_deterministic_algorithms(True)
    try:
        k, v = gather_contexts(contexts.kv_layer, most)
        out = dense_attention(wide, k, v, SCALE, most, tuning=RaggedTuning(32, 64))
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative_error(out[:9], chunks.exact(SCALE)) < TOLERANCE[torch.float32]
    end = min(-(-length // 128) * 128, 200)
    assert not k[length:end].any() and not v[length:end].any()


def test_chunks_begin_wherever_the_device_says() -> None:
    """As a graph of a whole step has them: more rows than there are, behind other tokens."""
    contexts = PagedContexts.create(
        (30, 9), num_kv_heads=2, head_dim=64, dtype=torch.float32, poisoned_tails=True
    )
    chunks = Chunks.create((11, 9), contexts, num_q_heads=4)
    tables = torch.cat((contexts.block_tables, torch.zeros_like(contexts.block_tables)))
    bounds = torch.tensor([(3, 14, 23, 23, 23), (0, 30, 39, 39, 39)], dtype=torch.int32)
    most = PrefillBatch.captured(tables, bounds, size=32, most_context=64, placed=True)
    assert choose(most, torch.float16, 64) is PrefillPath.PAGED
    q = torch.full((32, 4, 64), torch.nan)
    q[3:23] = chunks.q
    out = torch.full((32, 4, 64), 7.0)
    paged_attention(q, contexts.kv_layer, SCALE, most, out=out, tuning=RaggedTuning(32, 16))
    assert relative_error(out[3:23], chunks.exact(SCALE)) < TOLERANCE[torch.float32]
    assert (out[:3] == 7).all() and (out[23:] == 7).all()


@pytest.mark.parametrize(
    ("new_lens", "context_lens", "path"),
    [
        ((8192,), (8192,), PrefillPath.CUDNN),
        ((8000,), (8000,), PrefillPath.DENSE),  # a length of its own: a plan of its own
        ((2048,), (2048,), PrefillPath.DENSE),
        ((512,) * 16, (512,) * 16, PrefillPath.DENSE),
        ((2048,), (8192,), PrefillPath.GATHERED),
        ((512, 40), (8192, 40), PrefillPath.GATHERED),
        ((400,), (8192,), PrefillPath.GATHERED),
        ((40,), (8192,), PrefillPath.PAGED),
        ((100, 28), (500, 400), PrefillPath.PAGED),
    ],
)
def test_the_path_follows_from_the_lengths(
    new_lens: tuple[int, ...], context_lens: tuple[int, ...], path: PrefillPath
) -> None:
    tables = torch.zeros((len(new_lens), 1), dtype=torch.int32)
    batch = PrefillBatch.create(tables, new_lens, context_lens)
    assert choose(batch, torch.bfloat16, 128) is path


def test_cudnn_takes_no_fp32_and_no_odd_head() -> None:
    batch = PrefillBatch.create(torch.zeros((1, 1), dtype=torch.int32), (8192,), (8192,))
    assert choose(batch, torch.float32, 128) is PrefillPath.DENSE
    assert choose(batch, torch.bfloat16, 80) is PrefillPath.DENSE
