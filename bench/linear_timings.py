"""Times of the products of a decode step at the shape of an 8B Llama: cuBLAS and our kernel.

The floor is one read of the weights, at the rate of a device copy. Weights rotate, so that no
call finds its own in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.gpu.skinny_linear import SkinnyTuning, skinny_gated, skinny_linear
from ..kernels.silu_mul import silu_mul
from .timing import DEVICE, Job, Timing, graph_micros

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
    "1B qkv": (3072, 2048),
    "1B o": (2048, 2048),
    "1B down": (2048, 8192),
}
GATED = {"gated": (2 * 14336, 4096), "1B gated": (2 * 8192, 2048)}
TOKENS = (1, 16, 32, 64, 128)
_ROTATED_BYTES = 1 << 28


def tunings(size: int, columns: int, tokens: int) -> Iterator[SkinnyTuning]:
    """What may suit: about two or three programs for each multiprocessor."""
    for block_n, block_k, warps, stages in (
        (64, 64, 4, 6),
        (64, 128, 4, 4),
        (128, 64, 4, 4),
        (128, 64, 4, 6),
        (128, 128, 4, 3),
        (128, 128, 8, 3),
    ):
        if block_n == 64 and tokens > 64:
            continue
        tiles = -(-size // block_n)
        wanted = (264, 396) if block_n == 128 else (396,)
        for programs in wanted:
            splits = max(1, programs // tiles) if size < 128256 else 1
            if splits * block_k * 4 > columns:
                continue
            yield SkinnyTuning(block_n, block_k, warps, stages, splits)


class Linear:
    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth  # bytes/s

    def jobs(self) -> Iterator[Job]:
        for tokens in TOKENS:
            for name, (size, columns) in SHAPES.items():
                case = f"{name} {tokens}"
                yield Job(case, "cuBLAS", partial(self.time, case, name, tokens, None))
                for tuning in dict.fromkeys(tunings(size, columns, tokens)):
                    yield Job(case, f"{tuning}", partial(self.time, case, name, tokens, tuning))
            for name in GATED:
                case = f"{name} {tokens}"
                yield Job(case, "cuBLAS", partial(self.time, case, name, tokens, None))
                for stages, block_k in product((3, 4), (64, 128)):
                    tuning = SkinnyTuning(64, block_k, 4, stages)
                    yield Job(case, f"{tuning}", partial(self.time, case, name, tokens, tuning))

    def time(self, case: str, name: str, tokens: int, tuning: SkinnyTuning | None) -> Timing:
        size, columns = GATED[name] if name in GATED else SHAPES[name]
        count = max(2, _ROTATED_BYTES // (2 * size * columns))
        weights = list(
            torch.randn(count, size, columns, device=DEVICE, dtype=torch.bfloat16) * columns**-0.5
        )
        x = torch.randn(tokens, columns, device=DEVICE, dtype=torch.bfloat16)

        def call(weight: Tensor) -> Tensor:
            if name in GATED:
                if tuning is None:
                    return silu_mul(functional.linear(x, weight))
                return skinny_gated(x, weight, tuning)
            if tuning is None:
                return functional.linear(x, weight)
            return skinny_linear(x, weight, None, tuning)

        calls: list[Callable[[], object]] = [partial(call, weight) for weight in weights]
        micros = graph_micros(calls * 2)
        read = 2 * size * columns
        floor = read / self.bandwidth * 1e6
        return Timing(
            case, f"{tuning or 'cuBLAS'}", micros, read / micros / 1e6, "TB/s", floor / micros
        )
