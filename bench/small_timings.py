"""Times of what only moves memory, and of sampling, at the shape of an 8B Llama.

The floor is a device copy of as many bytes, in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..kernels.copy_blocks import gather_blocks
from ..kernels.rms_norm import rms_norm
from ..kernels.rope import rope_and_cache
from ..kernels.sampling import RowParams, TokenHistory, sample
from ..kernels.silu_mul import silu_mul
from .timing import DEVICE, Job, Timing, graph_micros

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
HIDDEN, INTERMEDIATE, VOCAB = 4096, 14336, 128256


class Elementwise:
    """What only moves memory, against a copy of as many bytes."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth  # bytes/s

    def jobs(self) -> Iterator[Job]:
        for tokens in (64, 8192):
            yield Job(f"rms_norm {tokens}", "", partial(self.rms_norm, tokens))
            yield Job(f"silu_mul {tokens}", "", partial(self.silu_mul, tokens))
            yield Job(f"rope {tokens}", "", partial(self.rope, tokens))
        yield Job("gather 256 blocks of 2 MiB", "", self.gather)

    def _timing(self, case: str, calls: Sequence[Callable[[], object]], moved: int) -> Timing:
        micros = graph_micros(calls)
        floor = moved / self.bandwidth * 1e6
        return Timing(case, "", micros, moved / micros / 1e6, "TB/s", floor / micros)

    @staticmethod
    def _copies(rows: int, width: int) -> list[Tensor]:
        """Enough different inputs that the caches do not hold them."""
        count = max(2, min(32, (1 << 29) // (rows * width)))
        return list(torch.randn(count, rows, width, device=DEVICE).bfloat16())

    def rms_norm(self, tokens: int) -> Timing:
        inputs = self._copies(tokens, HIDDEN)
        weight = torch.randn(HIDDEN, device=DEVICE).bfloat16()
        calls = [partial(rms_norm, x, weight, 1e-5, r) for x, r in pairwise(inputs)]
        return self._timing(f"rms_norm {tokens}", calls, 4 * inputs[0].nbytes)

    def silu_mul(self, tokens: int) -> Timing:
        inputs = self._copies(tokens, 2 * INTERMEDIATE)
        calls = [partial(silu_mul, x) for x in inputs]
        return self._timing(f"silu_mul {tokens}", calls, inputs[0].nbytes * 3 // 2)

    def rope(self, tokens: int) -> Timing:
        inputs = self._copies(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        pool = torch.zeros(
            tokens // BLOCK, 32, 2, KV_HEADS, BLOCK, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE
        )
        angles = torch.randn(8192, HEAD_DIM // 2, device=DEVICE)
        cos, sin = angles.cos(), angles.sin()
        at = torch.arange(tokens, device=DEVICE)
        calls = [
            partial(rope_and_cache, x, cos, sin, at, at, pool[:, layer % 32], num_q_heads=HEADS)
            for layer, x in enumerate(inputs)
        ]
        rotated = (HEADS + KV_HEADS) * HEAD_DIM * 2 * tokens
        cached = 2 * KV_HEADS * HEAD_DIM * 2 * tokens
        return self._timing(f"rope {tokens}", calls, inputs[0].nbytes + rotated + cached)

    def gather(self) -> Timing:
        pool = torch.randn(
            1024, 32, 2, KV_HEADS, BLOCK, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE
        )
        ids = torch.randperm(1024, device=DEVICE)[:256]
        out = torch.empty_like(pool[:256])
        calls = [partial(gather_blocks, pool, ids, out)] * 4
        return self._timing("gather 256 blocks of 2 MiB", calls, 2 * out.nbytes)


class Sampling:
    """A step's sampling, against one read of the logits."""

    VARIANTS = ("greedy", "plain", "top_k 50", "top_p 0.9", "top_k 20, top_p 0.95", "penalties")

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth  # bytes/s

    def jobs(self) -> Iterator[Job]:
        for batch in (1, 64, 256):
            for variant in self.VARIANTS:
                yield Job(f"sample {batch}", variant, partial(self.time, batch, variant))

    def time(self, batch: int, variant: str) -> Timing:
        logits = (torch.randn(4, batch, VOCAB, device=DEVICE) * 2.5).bfloat16()

        def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((batch,), value, dtype=dtype, device=DEVICE)

        top_k = {"top_k 50": 50, "top_k 20, top_p 0.95": 20}.get(variant, 0)
        top_p = {"top_p 0.9": 0.9, "top_k 20, top_p 0.95": 0.95}.get(variant, 1.0)
        rows = torch.arange(batch, device=DEVICE)
        params = RowParams(
            full(0.8),
            full(top_k, torch.int32),
            full(top_p),
            full(0),
            full(1.1),
            full(0.1),
            full(0.1),
            rows + 12345,
            torch.zeros_like(rows),
            rows,
            has_cuts=variant.startswith("top"),
        )
        tokens = torch.randint(0, VOCAB, (batch, 4096), device=DEVICE, dtype=torch.int32)
        history = TokenHistory(tokens, rows, full(2000, torch.int32), full(3000, torch.int32))
        given = None if variant == "greedy" else params
        seen = history if variant == "penalties" else None
        calls = [partial(sample, part, given, seen) for part in logits]
        micros = graph_micros(calls)
        read = logits[0].nbytes
        floor = read / self.bandwidth * 1e6
        return Timing(
            f"sample {batch}", variant, micros, read / micros / 1e6, "TB/s", floor / micros
        )
