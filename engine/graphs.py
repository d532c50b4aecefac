"""CUDA graphs of the decode step: one launch instead of hundreds.

One graph for each batch size of a ladder; a step of n rows runs as the next size up, its
padding rows reading the scratch slot and writing nothing. A graph's inputs are one packed
buffer at a fixed address, filled by one copy before each replay; what changes from step to
step beside it (tokens, block tables) is read from the slots' tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.progress import Progress
from ..kernels.decode_attention import DecodeWorkspace
from .batch import SingleRows, padded
from .model import Attention, Model, Tokens
from .slots import SlotTable
from .upload import pack, unpack


def ladder(max_rows: int) -> tuple[int, ...]:
    """Batch sizes up to ``max_rows``: eight apart, then at most a quarter more than the last."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, 513, 32)]
    below = [size for size in sizes if size < max_rows]
    return (*below, max_rows)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # [bytes] uint8, packed as SingleRows.arrays
    workspace: DecodeWorkspace  # the graph holds its addresses


class DecodeGraphs:
    """Captures on demand, or all sizes ahead with ``capture_all``."""

    def __init__(
        self,
        model: Model,
        table: SlotTable,
        new_workspace: Callable[[int], DecodeWorkspace],
        max_rows: int,
    ) -> None:
        """``new_workspace(max_batch)`` makes the scratch memory of one batch size."""
        self.sizes = ladder(max_rows)
        self._model = model
        self._table = table
        self._new_workspace = new_workspace
        self._captured: dict[int, _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()
        embedding = model.weights.embedding
        # One buffer for all sizes: steps run one after the other.
        self._logits = embedding.new_empty(  # [max_rows, vocab]
            max_rows, model.shape.vocab_size, dtype=model.weights.final_norm.dtype
        )

    def capture_all(self) -> None:
        """The largest first: the smaller ones fit into its memory."""
        with Progress("capturing decode steps", len(self.sizes)) as progress:
            for size in reversed(self.sizes):
                self._at(size)
                progress.advance(1)

    def run(self, rows: SingleRows) -> Tensor:
        """The logits ``[B, vocab]`` of the rows, valid until the next run."""
        size = self.sizes[bisect_left(self.sizes, len(rows))]
        captured = self._at(size)
        inputs = pack(padded(rows, size, self._table).arrays)
        captured.inputs.copy_(inputs, non_blocking=True)
        captured.graph.replay()
        return self._logits[: len(rows)]

    def _at(self, size: int) -> _Captured:
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        return self._captured[size]

    def _capture(self, size: int) -> _Captured:
        empty = padded(SingleRows.none(), size, self._table)
        inputs = pack(empty.arrays).to(self._logits.device)
        workspace = self._new_workspace(size)
        views = unpack(inputs, empty.arrays)
        out = self._logits[:size]
        # Once outside of the graph: kernels are compiled and libraries set up by their first
        # call, which a capture would refuse. Padding rows only, so nothing is written.
        side = torch.cuda.Stream(self._logits.device)
        side.wait_stream(torch.cuda.current_stream(self._logits.device))
        with torch.cuda.stream(side):
            decode_step(self._model, self._table, views, workspace, out)
        torch.cuda.current_stream(self._logits.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads copy KV blocks meanwhile: only this one's calls are captured.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            decode_step(self._model, self._table, views, workspace, out)
        return _Captured(graph, inputs, workspace)


def decode_step(
    model: Model, table: SlotTable, views: Sequence[Tensor], workspace: DecodeWorkspace, out: Tensor
) -> None:
    """The logits of B rows of one new token into ``out[B, vocab]``; ``views`` are the arrays of
    ``SingleRows`` on the device. All that it reads and writes stays at its address."""
    token_index, positions, cache_slots, slots, context_lens = views
    workspace.prepare(table.block_tables.index_select(0, slots), context_lens)
    ids = table.token_ids.view(-1).index_select(0, token_index)
    tokens = Tokens(ids, positions, cache_slots)
    attention = Attention(num_singles=len(slots), singles=workspace, chunks=None)
    model.logits(model.hidden(tokens, attention), out=out)
