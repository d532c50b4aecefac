"""CUDA graphs around the attention of a step that reads prompts.

How a step's tokens divide among sequences changes from step to step, and attention is launched
for it each time. All that lies between two attentions looks at tokens one by one: it is
captured once for a number of tokens, and a step is padded to the next number. What this
saves is the host's time: some ten launches a layer become one.

One chunk behind a prefix, which is what a long prompt or a cached one comes down to, is
captured with its attention: that reads from device memory how long its row is.

    capture    a graph before the first layer's attention, between each two, and after the last;
               they hand on queries, keys, values and what was attended to in buffers of fixed
               addresses, which all sizes share
    run        fill the inputs, and then replay and attend in turn
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels.prefill_attention import PrefillBatch
from .batch import Batch, token_arrays
from .model import Attention, Heads, Model, Tokens
from .slots import SlotTable
from .upload import pack, unpack

_T = TypeVar("_T")
_LAYER_MICROS = 700.0  # what the host takes for a layer's launches, at its slower times
_TERAFLOPS = 600.0
_MOST_EXACT = 2048
_WHOLE_CONTEXT = 16384  # tokens that a chunk captured whole may attend to
_WHOLE_SHARE = 64  # and how many for each new one: beyond, attention has another path


def chunk_sizes(max_tokens: int, worth: int) -> tuple[int, ...]:
    """Numbers of tokens up to ``worth``, a fifth apart or less from 320 on; and powers of two
    beyond, which chunks often are. None is over ``max_tokens``."""
    padded = [*range(64, 513, 64), *range(640, 1025, 128), *range(1280, 4097, 256)]
    sizes = {size for size in padded if size <= worth}
    exact = {1 << power for power in range(6, _MOST_EXACT.bit_length())}
    return tuple(size for size in sorted(sizes | exact) if size <= max_tokens)


def fitting(sizes: Sequence[int], worth: int, num_tokens: int) -> int | None:
    """The size in which a step runs, if any; one of more than ``worth`` tokens is not padded."""
    at = bisect_left(sizes, num_tokens)
    if at == len(sizes) or (num_tokens != sizes[at] and sizes[at] > worth):
        return None
    return sizes[at]


def can_be_whole(size: int, most_context: int) -> bool:
    """Whether a chunk of ``size`` tokens is captured with its attention: not where the longest
    context would be attended to in another way than most."""
    return size < most_context <= _WHOLE_SHARE * size


@dataclass(frozen=True, slots=True)
class _Captured:
    graphs: tuple[torch.cuda.CUDAGraph, ...]  # one more than layers
    inputs: Tensor  # [bytes] uint8, packed as ``token_arrays``
    heads: Heads  # views of the shared buffer


@dataclass(frozen=True, slots=True)
class _Whole:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # [bytes] uint8, packed as ``token_arrays``


class ChunkGraphs:
    """Captures on demand, or all sizes ahead with ``capture_all``."""

    def __init__(self, model: Model, table: SlotTable, max_tokens: int) -> None:
        self._model = model
        self._table = table
        shape, weights = model.shape, model.weights
        per_layer = weights.step_bytes / weights.lm_head.element_size() / shape.num_layers
        # With more tokens a layer keeps the GPU longer than its launches keep the host.
        self._worth = int(_LAYER_MICROS * _TERAFLOPS * 1e6 / (2 * per_layer))
        self.sizes = chunk_sizes(max_tokens, self._worth)
        self._captured: dict[int, _Captured] = {}
        self._whole: dict[int, _Whole] = {}
        self._most_context = min(_WHOLE_CONTEXT, table.max_context)
        self._block_table = torch.zeros_like(table.block_tables[:1])  # of the chunk run whole
        self._bounds = torch.zeros(2, 2, dtype=torch.int32, device=self._block_table.device)
        self._memory = torch.cuda.graph_pool_handle()
        most = self.sizes[-1] if self.sizes else 0

        def buffer(width: int) -> Tensor:
            return weights.embedding.new_zeros(most, width, dtype=weights.final_norm.dtype)

        self._qkv = buffer(shape.qkv_width)  # [T, (Hq + 2 Hkv) * D]
        self._attended = buffer(shape.num_q_heads * shape.head_dim)
        self._left = buffer(shape.hidden_size)

    def size_for(self, num_tokens: int) -> int | None:
        """None where each kernel is launched."""
        return fitting(self.sizes, self._worth, num_tokens)

    def capture_all(self) -> None:
        """The largest first: the smaller ones fit into its memory."""
        for size in reversed(self.sizes):
            self._at(size)
            if can_be_whole(size, self._most_context):
                self._whole_at(size)

    def run(self, batch: Batch, size: int, attention: Attention, at: Tensor | None) -> Tensor:
        """The last layer's normed output ``[S, hidden]`` for the tokens ``at[S]``, None: all."""
        count = batch.num_tokens
        inputs = pack(token_arrays(batch, size, self._table))
        chunks = attention.chunks
        if chunks is not None and self._runs_whole(attention, size):
            whole = self._whole_at(size)
            whole.inputs.copy_(inputs, non_blocking=True)
            self._block_table.copy_(chunks.block_tables)
            self._bounds.copy_(chunks.bounds)
            whole.graph.replay()
        else:
            self._run_layers(inputs, count, size, attention)
        left = self._left[:count] if at is None else self._left.index_select(0, at)
        return self._model.final_norm(left)

    def _run_layers(self, inputs: Tensor, count: int, size: int, attention: Attention) -> None:
        captured = self._at(size)
        captured.inputs.copy_(inputs, non_blocking=True)
        heads = captured.heads
        mine = Heads(heads.q[:count], heads.k[:count], heads.v[:count])
        attended = self._attended[:count].view(mine.q.shape)
        for layer, graph in enumerate(captured.graphs[:-1]):
            graph.replay()
            self._model.attend(layer, mine, attention, attended)
        captured.graphs[-1].replay()

    def _runs_whole(self, attention: Attention, size: int) -> bool:
        chunks = attention.chunks
        if chunks is None or attention.num_singles or len(chunks.new_lens) > 1:
            return False
        fits = chunks.context_lens[0] <= self._most_context
        return chunks.has_prefix and fits and can_be_whole(size, self._most_context)

    def _at(self, size: int) -> _Captured:
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        return self._captured[size]

    def _capture(self, size: int) -> _Captured:
        model, device = self._model, self._qkv.device
        inputs, tokens = self._new_inputs(size)
        qkv, attended, left = self._qkv[:size], self._attended[:size], self._left[:size]
        graphs: list[torch.cuda.CUDAGraph] = []

        def enter() -> tuple[Heads, Tensor]:
            return model.enter(self._looked_up(tokens), qkv)

        def leave(residual: Tensor) -> None:
            model.leave(attended, residual, left)

        # Kernels are compiled and libraries set up by their first call, which a capture refuses.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            _, residual = enter()
            _, residual = model.cross(0, attended, residual, tokens, qkv)
            leave(residual)
        torch.cuda.current_stream(device).wait_stream(side)

        heads, residual = self._record(graphs, enter)
        for layer in range(model.shape.num_layers - 1):
            # The residual lives on in the graphs' memory: no other graph runs in between.
            def cross(layer: int = layer, before: Tensor = residual) -> tuple[Heads, Tensor]:
                return model.cross(layer, attended, before, tokens, qkv)

            heads, residual = self._record(graphs, cross)
        last = residual
        self._record(graphs, lambda: leave(last))
        return _Captured(tuple(graphs), inputs, heads)

    def _whole_at(self, size: int) -> _Whole:
        if size not in self._whole:
            self._whole[size] = self._capture_whole(size)
        return self._whole[size]

    def _capture_whole(self, size: int) -> _Whole:
        """As ``_capture``, but for the longest row; the bounds of a run say how long it is."""
        model, device = self._model, self._qkv.device
        inputs, tokens = self._new_inputs(size)
        qkv, left = self._qkv[:size], self._left[:size]
        longest = PrefillBatch(
            self._block_table, (size,), (self._most_context,), (0, size), self._bounds
        )
        attention = Attention(0, None, longest)

        def attend(layer: int, heads: Heads) -> Tensor:
            attended = self._attended[:size]
            return model.attend(layer, heads, attention, attended.view(heads.q.shape))

        def step() -> None:
            heads, residual = model.enter(self._looked_up(tokens), qkv)
            for layer in range(model.shape.num_layers - 1):
                attended = attend(layer, heads)
                heads, residual = model.cross(layer, attended, residual, tokens, qkv)
            model.leave(attend(model.shape.num_layers - 1, heads), residual, left)

        self._bounds.zero_()  # no new token and no context
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            attend(0, model.enter(self._looked_up(tokens), qkv)[0])
        torch.cuda.current_stream(device).wait_stream(side)
        graphs: list[torch.cuda.CUDAGraph] = []
        self._record(graphs, step)
        return _Whole(graphs[0], inputs)

    def _new_inputs(self, size: int) -> tuple[Tensor, Tokens]:
        """A packed buffer and its views; in place of token ids, where they are looked up."""
        empty = token_arrays(Batch.none(), size, self._table)
        inputs = pack(empty).to(self._qkv.device)
        return inputs, Tokens(*unpack(inputs, empty))

    def _looked_up(self, tokens: Tokens) -> Tokens:
        ids = self._table.token_ids.view(-1).index_select(0, tokens.token_ids)
        return Tokens(ids, tokens.positions, tokens.cache_slots)

    def _record(self, graphs: list[torch.cuda.CUDAGraph], run: Callable[[], _T]) -> _T:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            result = run()
        graphs.append(graph)
        return result
