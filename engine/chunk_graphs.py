"""CUDA graphs around the attention of a step that reads prompts.

How a step's tokens divide among sequences changes from step to step, and attention is launched
for it each time. All that lies between two attentions looks at tokens one by one: it is
captured once for a number of tokens, and a step is padded to the next number. What this
saves is the host's time: some ten launches a layer become one.

Many steps go into one graph with their attention (``whole_graphs``); here are the others.

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

from .batch import Batch, token_arrays
from .model import Attention, Heads, Model, Tokens
from .slots import SlotTable
from .upload import pack, unpack

_T = TypeVar("_T")
_LAYER_MICROS = 750.0  # what the host takes for a layer's launches, at its slower times
_TERAFLOPS = 600.0
_MOST_EXACT = 2048


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


@dataclass(frozen=True, slots=True)
class _Captured:
    graphs: tuple[torch.cuda.CUDAGraph, ...]  # one more than layers
    inputs: Tensor  # [bytes] uint8, packed as ``token_arrays``
    heads: Heads  # views of the shared buffer


class ChunkGraphs:
    """Captures on demand, or all sizes ahead with ``capture_all``."""

    def __init__(self, model: Model, table: SlotTable, max_tokens: int) -> None:
        self._model = model
        self._table = table
        shape, weights = model.shape, model.weights
        per_layer = weights.step_bytes / weights.lm_head.element_size() / shape.num_layers
        # With more tokens a layer keeps the GPU longer than its launches keep the host.
        self.worth = int(_LAYER_MICROS * _TERAFLOPS * 1e6 / (2 * per_layer))
        self.sizes = chunk_sizes(max_tokens, self.worth)
        self._captured: dict[int, _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()
        most = self.sizes[-1] if self.sizes else 0

        def buffer(width: int) -> Tensor:
            return weights.embedding.new_zeros(most, width, dtype=weights.final_norm.dtype)

        self._qkv = buffer(shape.qkv_width)  # [T, (Hq + 2 Hkv) * D]
        self._attended = buffer(shape.num_q_heads * shape.head_dim)
        self._left = buffer(shape.hidden_size)

    def size_for(self, num_tokens: int) -> int | None:
        """None where each kernel is launched."""
        return fitting(self.sizes, self.worth, num_tokens)

    def capture_all(self) -> None:
        """The largest first: the smaller ones fit into its memory."""
        for size in reversed(self.sizes):
            self._at(size)

    def run(self, batch: Batch, size: int, attention: Attention, at: Tensor | None) -> Tensor:
        """The last layer's normed output ``[S, hidden]`` for the tokens ``at[S]``, None: all."""
        count = batch.num_tokens
        captured = self._at(size)
        inputs = pack(token_arrays(batch, size, self._table))
        captured.inputs.copy_(inputs, non_blocking=True)
        heads = captured.heads
        mine = Heads(heads.q[:count], heads.k[:count], heads.v[:count])
        attended = self._attended[:count].view(mine.q.shape)
        for layer, graph in enumerate(captured.graphs[:-1]):
            graph.replay()
            self._model.attend(layer, mine, attention, attended)
        captured.graphs[-1].replay()
        left = self._left[:count] if at is None else self._left.index_select(0, at)
        return self._model.final_norm(left)

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
