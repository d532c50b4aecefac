"""The compiled loops against float64 and against their twins in torch."""

from __future__ import annotations

import pytest
import torch

from pdserve.bench.kernel_cases import exact_silu_mul, relative_error
from pdserve.kernels import cpu_step
from pdserve.kernels.decode_attention import (
    DecodeWorkspace,
    decode_attention,
    decode_attention_reference,
    group_by_length,
)
from pdserve.kernels.rms_norm import rms_norm_reference
from pdserve.kernels.rope import rope_and_cache_reference

pytestmark = pytest.mark.skipif(
    not cpu_step.serves(torch.zeros(1, 8), 8), reason="no C compiler here"
)

MANY = 40  # rows: more than one thread takes part


@pytest.mark.parametrize("rows", [1, MANY])
def test_norm(rows: int) -> None:
    x, residual, weight = torch.randn(rows, 72), torch.randn(rows, 72), torch.randn(72)
    for other in (None, residual):
        found = cpu_step.rms_norm(x, weight, 1e-5, other)
        wanted = rms_norm_reference(x, weight, 1e-5, other)
        assert relative_error(found[0], wanted[0].double()) < 1e-6
        assert torch.equal(found[1], wanted[1])


def test_activation_over_the_whole_range_of_exp() -> None:
    gate = torch.linspace(-120, 120, 8 * 4000).reshape(MANY * 2, -1)
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    found, wanted = cpu_step.silu_mul(gate_up), exact_silu_mul(gate_up)
    error = (found.double() - wanted).abs() / wanted.abs().clamp_min(1e-30)
    assert error[gate > -80].max() < 1e-6
    assert found.isfinite().all() and found[gate < -80].abs().max() < 1e-30


@pytest.mark.parametrize("rows", [3, MANY])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("half", [8, 5])
def test_rope_and_cache(rows: int, normed: bool, half: int) -> None:
    heads, kv_heads, dim, block_size = 6, 2, 16, 4
    pool = torch.randn(30, 3, 2, kv_heads, block_size, dim)
    angles = torch.randn(50, half)
    positions = torch.randint(0, 50, (rows,))
    slots = torch.randperm(30 * block_size)[:rows]
    slots[1] = -1
    weights = torch.randn(2, dim) if normed else (None, None)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim)
    results = []
    for run in (cpu_step.rope_and_cache, rope_and_cache_reference):
        mine, cache = qkv.clone(), pool.clone()
        parts = run(
            mine,
            angles.cos(),
            angles.sin(),
            positions,
            slots,
            cache[:, 1],
            num_q_heads=heads,
            q_norm_weight=weights[0],
            k_norm_weight=weights[1],
        )
        results.append((*parts, cache))
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][3][:, ::2], pool[:, ::2])


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("group", [1, 3])
def test_attention(block_size: int, group: int) -> None:
    lengths = [1, 700, 0, block_size, block_size + 1, 37]
    kv_heads, dim = 2, 24
    width = 700 // block_size + 1
    pool = torch.randn(len(lengths) * width, 2, 2, kv_heads, block_size, dim)
    tables = torch.randperm(len(pool)).int().view(len(lengths), width)
    q = torch.randn(len(lengths), kv_heads * (group + 2), dim)[:, : kv_heads * group] * 3
    lens = torch.tensor(lengths, dtype=torch.int32)
    groups = group_by_length(tables, lens, block_size, torch.float32)
    wanted = decode_attention_reference(q.double(), pool[:, 1].double(), 0.2, _double(groups))
    workspace = DecodeWorkspace(
        max_batch=8,
        num_q_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=dim,
        block_size=block_size,
        dtype=torch.float32,
        device="cpu",
    )
    workspace.prepare(tables, lens)
    assert workspace.paged is not None
    found = decode_attention(q, pool[:, 1], 0.2, workspace)
    assert relative_error(found, wanted) < 1e-6

    alone = []
    for row in range(len(lengths)):
        workspace.prepare(tables[row : row + 1], lens[row : row + 1])
        alone.append(decode_attention(q[row : row + 1], pool[:, 1], 0.2, workspace))
    assert torch.equal(found, torch.cat(alone)), "a row depends on its neighbours"


def _double(groups):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return tuple(replace(g, mask=None if g.mask is None else g.mask.double()) for g in groups)
