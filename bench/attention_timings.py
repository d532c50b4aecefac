"""Times of the attention kernels at the shape of an 8B Llama, beside their floors.

For decode that is a loop that only reads the same blocks, in the same run; for prefill the
speed of cuDNN's kernel on one dense prompt of 8,192 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.gpu.decode_attention import DecodeTuning, SplitWorkspace, decode_attention
from ..kernels.gpu.gather_contexts import gather_contexts
from ..kernels.gpu.prefill_attention import cudnn_attention, prefill_attention
from ..kernels.gpu.ragged_attention import RaggedTuning, dense_attention, paged_attention
from ..kernels.prefill_attention import PrefillBatch
from ..kernels.rope import split_heads
from .read_floor import ReadTuning, new_output, read_only
from .timing import DEVICE, Job, Timing, event_micros, graph_micros

LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
_BURST = 8  # prefill calls timed together, as the layers of a step follow each other


class Decode:
    """Decode attention over 32 layers of a pool that is far larger than the caches."""

    SHAPES = ((32, 4096), (1, 16384), (64, 1024), (256, 1024), (1, 1024))
    TUNINGS = (
        DecodeTuning(),
        DecodeTuning(64, 2, 4, 4),
        DecodeTuning(64, 2, 6, 2),
        DecodeTuning(64, 4, 4, 4),
        DecodeTuning(32, 1, 6, 4),
        DecodeTuning(32, 1, 3, 6),
        DecodeTuning(128, 4, 2, 4),
    )
    READS = (
        ReadTuning(32, 4, 1),
        ReadTuning(64, 4, 1),
        ReadTuning(64, 2, 1),
        ReadTuning(64, 4, 3),
        ReadTuning(64, 8, 3),
        ReadTuning(128, 8, 2),
    )

    def __init__(self) -> None:
        most = max(batch * length for batch, length in self.SHAPES)
        shape = (most // BLOCK, LAYERS, 2, KV_HEADS, BLOCK, HEAD_DIM)
        self.pool = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
        self.floors: dict[str, float] = {}
        # The floor and all variants read the same blocks: where they lie makes some percent.
        self.blocks = torch.randperm(self.pool.shape[0], device=DEVICE).int()

    def jobs(self) -> Iterator[Job]:
        for batch, length in self.SHAPES:
            case = f"decode {batch} x {length}"
            for read in self.READS:
                yield Job(case, f"floor {read}", partial(self.read, batch, length, read))
            yield Job(case, "chosen", partial(self.time, batch, length, None))
            for tuning in self.TUNINGS:
                yield Job(case, f"{tuning}", partial(self.time, batch, length, tuning))

    def workspace(self, batch: int, length: int, tuning: DecodeTuning | None) -> SplitWorkspace:
        tables = self.blocks[: batch * length // BLOCK].view(batch, -1)
        workspace = SplitWorkspace(
            max_batch=batch,
            num_q_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
            device=torch.device(DEVICE),
            tuning=tuning,
        )
        lens = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
        workspace.prepare(tables, lens)
        return workspace

    def read(self, batch: int, length: int, tuning: ReadTuning) -> Timing:
        workspace = self.workspace(batch, length, DecodeTuning(tuning.block_n))
        out = new_output(workspace, KV_HEADS)
        micros = graph_micros(
            [
                partial(read_only, self.pool[:, layer], workspace, out, tuning)
                for layer in range(LAYERS)
            ]
        )
        case = f"decode {batch} x {length}"
        self.floors[case] = min(micros, self.floors.get(case, micros))
        return self._timing(batch, length, f"floor {tuning}", micros)

    def time(self, batch: int, length: int, tuning: DecodeTuning | None) -> Timing:
        workspace = self.workspace(batch, length, tuning)
        q = torch.randn(batch, HEADS, HEAD_DIM, device=DEVICE).bfloat16()
        micros = graph_micros(
            [
                partial(decode_attention, q, self.pool[:, layer], SCALE, workspace)
                for layer in range(LAYERS)
            ]
        )
        return self._timing(batch, length, f"{tuning or 'chosen'}", micros)

    def _timing(self, batch: int, length: int, variant: str, micros: float) -> Timing:
        case = f"decode {batch} x {length}"
        read = batch * length * KV_HEADS * HEAD_DIM * 2 * 2  # bytes
        floor = self.floors.get(case)
        ratio = None if floor is None else floor / micros
        return Timing(case, variant, micros, read / micros / 1e6, "TB/s", ratio)


class Prefill:
    """Prefill attention: ``(rows, new tokens, context)`` each."""

    SHAPES = (
        (1, 8192, 8192),
        (1, 6000, 6000),
        (1, 2048, 2048),
        (1, 2048, 8192),
        (1, 512, 8192),
        (1, 128, 8192),
        (4, 2048, 2048),
        (16, 512, 512),
    )
    TUNINGS = (
        RaggedTuning(128, 64, 8, 3),
        RaggedTuning(128, 64, 8, 5),
        RaggedTuning(128, 128, 8, 3),
        RaggedTuning(64, 64, 4, 3),
    )

    def __init__(self) -> None:
        self.best_rate = 0.0  # of cuDNN, dense 8k

    def jobs(self) -> Iterator[Job]:
        yield Job("prefill 1 x 8192", "cuDNN, dense", self.cudnn_dense)
        for shape in self.SHAPES:
            case = self._case(*shape)
            variants = ["chosen", "flash, dense"]
            if shape[0] == 1 and shape[1] == shape[2]:
                variants.append("cudnn")
            for variant in variants:
                yield Job(case, variant, partial(self.time, shape, variant, None))
            for tuning in self.TUNINGS:
                for path in ("paged", "dense", "gather + dense"):
                    if shape[1] < shape[2] or path == "dense":
                        yield Job(
                            case,
                            f"{path} {tuning}",
                            partial(self.time, shape, path, tuning),
                        )

    @staticmethod
    def _case(rows: int, new: int, length: int) -> str:
        return f"prefill {rows} x {new}" + (f" of {length}" if length > new else "")

    def cudnn_dense(self) -> Timing:
        q, k, v = (
            torch.randn(1, heads, 8192, HEAD_DIM, device=DEVICE).bfloat16()
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            micros = event_micros(
                lambda: functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                ),
                burst=_BURST,
            )
        self.best_rate = self._flops(1, 8192, 8192) / micros / 1e6
        return Timing("prefill 1 x 8192", "cuDNN, dense", micros, self.best_rate, "TFLOP/s", 1.0)

    @staticmethod
    def _flops(rows: int, new: int, length: int) -> float:
        pairs = new * (length - new) + new * (new + 1) / 2
        return rows * pairs * HEADS * HEAD_DIM * 4

    def inputs(self, rows: int, new: int, length: int) -> tuple[Tensor, Tensor, PrefillBatch]:
        blocks = rows * -(-length // BLOCK)
        shape = (blocks, 2, 2, KV_HEADS, BLOCK, HEAD_DIM)
        pool = torch.randn(shape, device=DEVICE).bfloat16()
        tables = torch.randperm(blocks, device=DEVICE).int().view(rows, -1)
        batch = PrefillBatch.create(tables, [new] * rows, [length] * rows)
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        return torch.randn(rows * new, width, device=DEVICE).bfloat16(), pool[:, 1], batch

    def time(
        self, shape: tuple[int, int, int], variant: str, tuning: RaggedTuning | None
    ) -> Timing:
        qkv, layer, batch = self.inputs(*shape)
        q, k, v = split_heads(qkv, HEADS, HEAD_DIM)
        all_k, all_v = (k, v) if not batch.has_prefix else gather_contexts(layer, batch)
        longest = (max(batch.new_lens), max(batch.context_lens))

        def flash() -> object:
            return torch.ops.aten._flash_attention_forward(
                q, all_k, all_v, *batch.bounds, *longest, 0.0, True, False, scale=SCALE
            )

        calls: dict[str, Callable[[], object]] = {
            "chosen": lambda: prefill_attention(q, k, v, layer, SCALE, batch),
            "cudnn": lambda: cudnn_attention(q, k, v, SCALE),
            "flash, dense": flash,
            "paged": lambda: paged_attention(q, layer, SCALE, batch, tuning=tuning),
            "dense": lambda: dense_attention(q, all_k, all_v, SCALE, batch, tuning=tuning),
            "gather + dense": lambda: dense_attention(
                q, *gather_contexts(layer, batch), SCALE, batch, tuning=tuning
            ),
        }
        micros = event_micros(calls[variant], burst=_BURST)
        rate = self._flops(*shape) / micros / 1e6
        name = variant if tuning is None else f"{variant} {tuning}"
        ratio = rate / self.best_rate if self.best_rate else None
        return Timing(self._case(*shape), name, micros, rate, "TFLOP/s", ratio)
