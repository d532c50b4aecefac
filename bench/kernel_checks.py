"""Every kernel on the GPU against float64, over the shapes that go wrong first.

A check returns its relative error, and fails above its limit. New memory is NaN, as is the
pool wherever a kernel must not look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.copy_blocks import gather_blocks, scatter_blocks
from ..kernels.decode_attention import decode_attention
from ..kernels.gpu.gather_contexts import gather_contexts
from ..kernels.gpu.ragged_attention import dense_attention, paged_attention
from ..kernels.linear import gated_linear, linear, linear_parts
from ..kernels.prefill_attention import PrefillBatch, prefill_attention
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope_and_cache, split_heads
from ..kernels.sampling import LogitBias, RowParams, TokenHistory, sample, sample_reference
from ..kernels.silu_mul import silu_mul
from .kernel_cases import (
    Chunks,
    PagedContexts,
    exact_rms_norm,
    exact_rope,
    exact_silu_mul,
    relative_error,
)

DEVICE = "cuda"
LIMIT = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
SCALE = 0.11
_Group = TypeVar("_Group", RowParams, TokenHistory, LogitBias)


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    limit: float
    error: Callable[[], float]  # NaN fails too

    def passes(self, error: float) -> bool:
        return error <= self.limit


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer, until they are written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def all_checks() -> list[Check]:
    """Needs a GPU to run, not to list."""
    return [*_elementwise(), *_linear(), *_decode(), *_prefill(), *_sampling()]


def _elementwise() -> Iterator[Check]:
    for dtype, limit in LIMIT.items():
        for shape in ((1, 4096), (5, 576), (300, 1100)):
            name = f"{shape} {dtype}"
            yield Check(f"rms_norm {name}", limit, partial(_rms_norm, shape, dtype))
            yield Check(f"silu_mul {name}", limit, partial(_silu_mul, shape, dtype))
        for heads, half, normed in (
            ((32, 8, 128), 64, False),
            ((9, 3, 64), 32, False),
            ((4, 4, 80), 20, True),
        ):
            name = f"rope {heads} rot {2 * half}{' normed' if normed else ''} {dtype}"
            yield Check(name, limit, partial(_rope, heads, half, normed, dtype))
    yield Check("copy_blocks", 0.0, _copy_blocks)


def _linear() -> Iterator[Check]:
    """With the tunings that are chosen, and cuBLAS where none is."""
    for tokens in (1, 3, 16, 33, 64, 100, 200):
        for size, columns in ((6144, 4096), (4096, 14336), (1000, 576), (128256, 2048)):
            name = f"{tokens} x {columns} x {size}"
            yield Check(f"linear {name}", 1e-2, partial(_product, tokens, size, columns))
        for size, columns in ((14336, 4096), (1536, 576)):
            name = f"{tokens} x {columns} x 2 x {size}"
            yield Check(f"gated {name}", 1e-2, partial(_gated, tokens, size, columns))


def _product(tokens: int, size: int, columns: int) -> float:
    x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
    weight = (torch.randn(size, columns, device=DEVICE) * columns**-0.5).bfloat16()
    bias = torch.randn(size, device=DEVICE).bfloat16()
    exact = x.double() @ weight.double().t()
    parts = linear_parts(x, weight, bias)
    return max(
        relative_error(linear(x, weight), exact),
        relative_error(parts.sum(0) if parts.dim() == 3 else parts, exact + bias),
    )


def _gated(tokens: int, size: int, columns: int) -> float:
    x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
    weight = (torch.randn(2 * size, columns, device=DEVICE) * columns**-0.5).bfloat16()
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=1)
    return relative_error(gated_linear(x, weight), functional.silu(gate) * up)


def _rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> float:
    x, residual = torch.randn(2, *shape, device=DEVICE).to(dtype)
    weight = torch.randn(shape[1], device=DEVICE).to(dtype)
    normed, out = rms_norm(x, weight, 1e-5, residual)
    alone, _ = rms_norm(x, weight, 1e-5)
    return max(
        relative_error(out, x.double() + residual.double()),
        relative_error(normed, exact_rms_norm(x + residual, weight, 1e-5)),
        relative_error(alone, exact_rms_norm(x, weight, 1e-5)),
    )


def _silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> float:
    gate_up = (torch.randn(shape[0], 2 * shape[1], device=DEVICE) * 4).to(dtype)
    return relative_error(silu_mul(gate_up), exact_silu_mul(gate_up))


def _rope(heads: tuple[int, int, int], half: int, normed: bool, dtype: torch.dtype) -> float:
    num_q, num_kv, head_dim = heads
    qkv = torch.randn(5, (num_q + 2 * num_kv) * head_dim, device=DEVICE).to(dtype)
    angles = torch.rand(100, half, device=DEVICE) * 2 * math.pi
    positions = torch.tensor([3, 99, 0, 17, 1], device=DEVICE)
    slots = torch.tensor([35, 0, -1, 47, 36], device=DEVICE)
    pool = torch.full((4, 3, 2, num_kv, 16, head_dim), math.nan, dtype=dtype, device=DEVICE)
    weights = torch.randn(2, head_dim, device=DEVICE).to(dtype)
    exact = [part.double() for part in split_heads(qkv, num_q, head_dim)]
    for index in (0, 1):
        if normed:
            exact[index] = exact_rms_norm(exact[index], weights[index], 1e-5)
        exact[index] = exact_rope(exact[index], angles.cos(), angles.sin(), positions)
    q, k, v = rope_and_cache(
        qkv,
        angles.cos(),
        angles.sin(),
        positions,
        slots,
        pool[:, 1],
        num_q_heads=num_q,
        q_norm_weight=weights[0] if normed else None,
        k_norm_weight=weights[1] if normed else None,
        eps=1e-5,
    )
    errors = [relative_error(part, right) for part, right in zip((q, k, v), exact, strict=True)]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            entry = pool[slot // 16, 1, :, :, slot % 16]  # [2, Hkv, D]
            errors += [relative_error(entry[0], k[token]), relative_error(entry[1], v[token])]
            entry.fill_(math.nan)
    untouched = bool(pool.isnan().all())
    return max(errors) if untouched else math.inf


def _copy_blocks() -> float:
    pool = torch.randn(40, 3, 2, 8, 16, 128, device=DEVICE).bfloat16()
    ids = torch.tensor([39, 0, 17], device=DEVICE)
    staged = torch.empty(3, *pool.shape[1:], dtype=pool.dtype, device=DEVICE)
    gather_blocks(pool, ids, staged)
    back = torch.zeros_like(pool)
    scatter_blocks(back, ids, staged)
    right = torch.zeros_like(pool)
    right[ids] = pool[ids]
    return relative_error(back, right)


def _decode() -> Iterator[Check]:
    for dtype, limit in LIMIT.items():
        for group, num_kv, head_dim, lens in (
            (4, 8, 128, (1, 16, 17, 0, 1000, 4097)),
            (3, 3, 64, (0, 0, 700)),
            (1, 4, 80, (333,)),
            (7, 4, 128, (64,) * 9),
            (8, 1, 256, (31, 2000)),
        ):
            name = f"decode group {group} kv {num_kv} dim {head_dim} {dtype}"
            yield Check(name, limit, partial(_decode_error, group, num_kv, head_dim, lens, dtype))
    yield Check("decode graph replayed with other lengths", 1e-2, _decode_replay)


def _contexts(
    lens: tuple[int, ...], num_kv: int, head_dim: int, dtype: torch.dtype, spread: float = 2.0
) -> PagedContexts:
    return PagedContexts.create(
        lens,
        num_kv_heads=num_kv,
        head_dim=head_dim,
        dtype=dtype,
        device=DEVICE,
        num_layers=3,
        spread=spread,
        poisoned_tails=True,
    )


def _decode_error(
    group: int, num_kv: int, head_dim: int, lens: tuple[int, ...], dtype: torch.dtype
) -> float:
    contexts = _contexts(lens, num_kv, head_dim, dtype)
    wide = torch.randn(len(lens), group * num_kv + 2, head_dim, device=DEVICE).to(dtype)
    q = wide[:, 1:-1]
    out = decode_attention(q, contexts.kv_layer, SCALE, contexts.workspace(group * num_kv))
    return relative_error(out, contexts.exact_decode(q, SCALE))


def _decode_replay() -> float:
    contexts = _contexts((900, 5, 3000, 70), 8, 128, torch.bfloat16)
    q = torch.randn(4, 32, 128, device=DEVICE).bfloat16()
    lens = torch.tensor([1, 0, 17, 2], dtype=torch.int32, device=DEVICE)
    workspace = contexts.workspace(32)

    def step() -> Tensor:
        workspace.prepare(contexts.block_tables, lens)
        return decode_attention(q, contexts.kv_layer, SCALE, workspace)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    errors = []
    for row in (None, 1):  # all rows as they are, then one as padding
        lens.copy_(contexts.context_lens_tensor)
        exact = contexts.exact_decode(q, SCALE)
        if row is not None:
            lens[row] = 0
            exact[row] = 0
        out.fill_(math.nan)
        graph.replay()
        errors.append(relative_error(out, exact))
    return max(errors)


def _prefill() -> Iterator[Check]:
    cases = (
        (4, 8, 128, (1,), (1,)),
        (4, 8, 128, (700, 33, 1, 129), (700, 500, 78, 129)),
        (4, 8, 128, (600, 513), (600, 513)),
        (4, 8, 128, (512, 700), (1024, 700)),
        (3, 3, 64, (300, 5), (300, 5)),
        (4, 8, 128, (64, 5), (4000, 3000)),  # keys divided among programs
        (7, 4, 80, (40,), (2000,)),
        (1, 2, 256, (100,), (150,)),
    )
    for dtype, limit in LIMIT.items():
        # In fp32 tiles of 256 dimensions take long to compile, and no model uses them.
        for case in cases if dtype != torch.float32 else cases[:-1]:
            for path in ("chosen", "paged", "dense"):
                yield Check(
                    f"prefill {path} {case} {dtype}",
                    limit,
                    partial(_prefill_error, path, case, dtype),
                )
    yield Check("prefill graph replayed with other lengths", 1e-2, _prefill_replay)
    # A length that is left to cuDNN.
    long = (4, 2, 128, (4096,), (4096,))
    bf16 = torch.bfloat16
    yield Check(
        f"prefill chosen {long}", LIMIT[bf16], partial(_prefill_error, "chosen", long, bf16)
    )


def _prefill_replay() -> float:
    """Captured for the longest row, replayed with shorter ones."""
    contexts = _contexts((900, 333, 641), 8, 128, torch.bfloat16)
    chunks = Chunks.create((100, 33, 128), contexts, num_q_heads=32)
    table = contexts.block_tables[:1].clone()
    bounds = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    most = PrefillBatch.captured(table, bounds, 128, 1500)
    q = torch.zeros(128, 32, 128, dtype=torch.bfloat16, device=DEVICE)

    def step() -> Tensor:
        return dense_attention(q, *gather_contexts(contexts.kv_layer, most), SCALE, most)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    errors = []
    exact = chunks.exact(SCALE).split(chunks.batch.new_lens)
    for row, mine in enumerate(chunks.q.split(chunks.batch.new_lens)):
        q.fill_(math.nan)
        q[: len(mine)] = mine
        table.copy_(contexts.block_tables[row : row + 1])
        bounds.copy_(torch.tensor([(0, len(mine)), (0, contexts.context_lens[row])]))
        out.fill_(math.nan)
        graph.replay()
        errors.append(relative_error(out[: len(mine)], exact[row]))
    return max(errors)


_PrefillCase = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]


def _prefill_error(path: str, case: _PrefillCase, dtype: torch.dtype) -> float:
    group, num_kv, head_dim, new_lens, lens = case
    contexts = _contexts(lens, num_kv, head_dim, dtype)
    chunks = Chunks.create(new_lens, contexts, num_q_heads=group * num_kv)
    q, batch, layer = chunks.q, chunks.batch, contexts.kv_layer
    if path == "chosen":
        out = prefill_attention(q, chunks.k, chunks.v, layer, SCALE, batch)
    elif path == "paged":
        out = paged_attention(q, layer, SCALE, batch)
    else:
        out = dense_attention(q, *gather_contexts(layer, batch), SCALE, batch)
    return relative_error(out, chunks.exact(SCALE))


def _sampling() -> Iterator[Check]:
    for vocab in (1000, 49152, 128256):
        for dtype in (torch.float32, torch.bfloat16):
            for full in (False, True):
                name = f"sample vocab {vocab}{' penalised, biased' if full else ''} {dtype}"
                # One draw of 32 may sit within a rounding of a cut.
                yield Check(name, 1 / 32, partial(_sample_error, vocab, dtype, full))


def _sample_error(vocab: int, dtype: torch.dtype, full: bool) -> float:
    """The share of draws that differ from the CPU reference's."""
    shapes = (
        (1.0, 0, 1.0, 0.0),
        (0.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (1.3, 0, 1.0, 0.1),
        (0.8, 20, 0.95, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.0, 1000, 0.5, 0.02),
    ) * 4
    rows = len(shapes)
    temperature, top_k, top_p, min_p = (
        torch.tensor(list(part)) for part in zip(*shapes, strict=True)
    )
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    params = RowParams(
        temperature,
        top_k.int(),
        top_p,
        min_p,
        torch.full((rows,), 1.2),
        torch.full((rows,), 0.3),
        torch.full((rows,), 0.1),
        torch.arange(rows) * 2**57 + 3,
        torch.arange(rows) % 3,
        torch.arange(rows),
    )
    history = bias = None
    if full:
        history = TokenHistory(
            torch.randint(0, vocab, (rows + 1, 3000), dtype=torch.int32),
            torch.arange(rows, 0, -1),
            torch.arange(rows, dtype=torch.int32) * 9,
            torch.arange(rows, dtype=torch.int32) * 90 + 1,
        )
        bias = LogitBias(
            torch.tensor([0, 0, 5]), torch.tensor([7, 7, 9]), torch.tensor([5.0, 1.0, -math.inf])
        )
    expected = sample_reference(logits, params, history, bias)
    drawn = sample(logits.to(DEVICE), _moved(params), _moved(history), _moved(bias))
    return float((drawn.cpu() != expected).double().mean())


def _moved(group: _Group | None) -> _Group | None:
    """The same on the GPU."""
    if group is None:
        return None
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    moved: dict[str, Any] = {
        name: value.to(DEVICE) for name, value in values.items() if isinstance(value, Tensor)
    }
    return replace(group, **moved)
