"""What a virtual worker is made of."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.cost import StepCost


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How a worker is made. ``cost`` is what it believes; steps take ``slowdown`` times that, or
    ``truth``, with a jitter of that relative deviation.

    ``paced``: chunks are as large as the batch leaves room for (``prefill.pace``), at most
    ``chunk_tokens``; else always ``chunk_tokens``, less a token for each running sequence.
    ``demote``: prompts certain to miss their deadline step behind the others.
    """

    cost: StepCost
    num_blocks: int
    block_size: int = 16
    max_batch: int = 256
    chunk_tokens: int = 2048
    paced: bool = True
    demote: bool = True
    prefix_cache: bool = False
    slowdown: float = 1.0
    jitter: float = 0.0
    truth: StepCost | None = None
    transfer_s: float = 0.003  # a transfer's own time
    transfer_s_per_token: float = 1.3e-6  # 128 KiB a token at 100 GB/s
