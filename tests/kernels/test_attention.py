"""The references of both attentions against a full softmax matrix in float64."""

from __future__ import annotations

import pytest
import torch

from pdserve.bench.kernel_cases import Chunks, PagedContexts, relative_error
from pdserve.kernels.decode_attention import decode_attention
from pdserve.kernels.prefill_attention import prefill_attention

pytestmark = pytest.mark.usefixtures("cpu_path")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SCALE = 0.11


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("group", "num_kv_heads", "head_dim", "context_lens"),
    [
        (1, 2, 80, (33,)),
        (3, 3, 64, (1, 16, 17, 0, 250, 300)),  # several groups of length, and a padding row
        (4, 2, 128, (40, 40, 40)),
        (7, 1, 96, (0, 0)),
        (8, 1, 256, (31, 18, 20)),
    ],
)
def test_decode(
    group: int,
    num_kv_heads: int,
    head_dim: int,
    context_lens: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    contexts = PagedContexts.create(
        context_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, spread=2
    )
    num_q_heads = group * num_kv_heads
    wide = torch.randn(len(context_lens), num_q_heads + 2, head_dim).to(dtype)
    q = wide[:, 1:-1]  # not dense, as a view of qkv is
    out = decode_attention(q, contexts.kv_layer, SCALE, contexts.workspace(num_q_heads))
    exact = contexts.exact_decode(q, SCALE)
    assert out.shape == q.shape
    assert relative_error(out, exact) < TOLERANCE[dtype]
    assert not out[[length == 0 for length in context_lens]].any()


def test_a_workspace_serves_one_step_after_the_other() -> None:
    contexts = PagedContexts.create((20, 5), num_kv_heads=1, head_dim=64, dtype=torch.float32)
    workspace = contexts.workspace(2)
    q = torch.randn(2, 2, 64)
    workspace.prepare(contexts.block_tables[:1], contexts.context_lens_tensor[:1])
    out = decode_attention(q[:1], contexts.kv_layer, SCALE, workspace)
    assert relative_error(out, contexts.exact_decode(q, SCALE)[:1]) < 1e-6
    workspace.prepare(contexts.block_tables, contexts.context_lens_tensor)
    out = decode_attention(q, contexts.kv_layer, SCALE, workspace)
    assert relative_error(out, contexts.exact_decode(q, SCALE)) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("group", "num_kv_heads", "head_dim", "new_lens", "context_lens"),
    [
        (1, 2, 80, (1,), (1,)),
        (3, 3, 64, (5, 40, 1), (5, 100, 33)),  # without a prefix, with one, one new token
        (4, 1, 128, (33, 16), (33, 16)),
        (8, 1, 96, (17,), (50,)),
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
        context_lens, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, spread=2
    )
    chunks = Chunks.create(new_lens, contexts, num_q_heads=group * num_kv_heads)
    out = prefill_attention(chunks.q, chunks.k, chunks.v, contexts.kv_layer, SCALE, chunks.batch)
    assert out.is_contiguous()
    assert relative_error(out, chunks.exact(SCALE)) < TOLERANCE[dtype]


def test_a_chunk_continues_what_a_whole_prompt_computes() -> None:
    contexts = PagedContexts.create((90,), num_kv_heads=2, head_dim=64, dtype=torch.float32)
    whole = Chunks.create((90,), contexts, num_q_heads=4)
    exact = whole.exact(SCALE)
    tail = Chunks.create((25,), contexts, num_q_heads=4)
    out = prefill_attention(whole.q[-25:], tail.k, tail.v, contexts.kv_layer, SCALE, tail.batch)
    assert relative_error(out, exact[-25:]) < 1e-6
