"""CUDA graphs of whole steps that read prompts: one launch instead of some hundreds.

In a step with a batch and a chunk beside it the GPU does little more than in the batch's own,
and the host, launching each attention of each layer, would take longer than that. So all of it is
captured, attention as well, for a number of tokens; a step is padded to the next number. How the
tokens divide among sequences is read from device memory at each replay:

    beside    up to as many rows of one new token as there are tokens or slots, then up to
              four chunks. The rows are attended to first, those that are none read as zeros;
              then the chunks, wherever they begin, over the pool's blocks
    short     up to four chunks with few tokens, attended to in the same way
    behind    one longer chunk behind a prefix, which is what a long prompt or a cached one comes
              down to: attention over its gathered context

What neither serves goes layer by layer: see ``chunk_graphs``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch
from torch import Tensor

from ..core.progress import Progress
from ..kernels.decode_attention import DecodeWorkspace
from ..kernels.prefill_attention import PrefillBatch
from .batch import Batch, ChunkRows, padded, token_arrays
from .chunk_graphs import chunk_sizes
from .model import Attention, Model, Tokens
from .slots import Ints, SlotTable
from .upload import Array, pack, unpack

MOST_CHUNKS = 4
_MOST_BESIDE = 1024
_MOST_SHORT = 512
_GATHERED_CONTEXT = 16384  # tokens that one chunk's gathered context may have
_GATHERED_SHARE = 64  # and how many for each new one: beyond, attention has another path


class Kind(Enum):
    BESIDE = auto()
    SHORT = auto()
    BEHIND = auto()

    def holds(self, size: int, most_context: int) -> bool:
        """Whether there is a graph of so many tokens; ``most_context``: what is gathered at most.

        Behind a prefix, not where the longest context would be attended to in another way than
        most; and with more tokens than these the GPU takes longer than the host's launches.
        """
        match self:
            case Kind.BESIDE:
                return size <= _MOST_BESIDE
            case Kind.SHORT:
                return size <= _MOST_SHORT
            case Kind.BEHIND:
                return size < most_context <= _GATHERED_SHARE * size


def kind_of(batch: Batch, size: int, most_context: int) -> Kind | None:
    """In which graph of ``size`` tokens the step runs; None: in none."""
    chunks, count = batch.chunks, len(batch.chunks)
    if len(batch.singles):
        kind = Kind.BESIDE if 0 < count <= MOST_CHUNKS else None
    elif (
        count == 1 and _has_gathered(chunks, most_context) and Kind.BEHIND.holds(size, most_context)
    ):
        kind = Kind.BEHIND
    else:
        kind = Kind.SHORT if count <= MOST_CHUNKS else None
    return kind if kind is not None and kind.holds(size, most_context) else None


def _has_gathered(chunks: ChunkRows, most_context: int) -> bool:
    return chunks.new_lens != chunks.context_lens and chunks.context_lens[0] <= most_context


def step_arrays(batch: Batch, size: int, most_rows: int, table: SlotTable) -> tuple[Array, ...]:
    """What a step's graph reads, padded: the tokens' ``(token_index, positions, cache_slots)``
    [size] each; the single rows' slots and context_lens [most_rows]; the chunks' slots
    [MOST_CHUNKS] and their bounds [2, MOST_CHUNKS + 1], as ``PrefillBatch`` has them but
    counted from the step's first token. Chunks that are none begin and end at the last one's end.
    """
    singles = padded(batch.singles, most_rows, table) if most_rows else batch.singles
    chunks = batch.chunks
    more = MOST_CHUNKS - len(chunks)
    slots: Ints = np.concatenate((chunks.slots, np.full(more, table.scratch, np.int64)))
    bounds = np.zeros((2, MOST_CHUNKS + 1), np.int32)
    bounds[0, 0] = len(batch.singles)
    lens = (chunks.new_lens + (0,) * more, chunks.context_lens + (0,) * more)
    bounds[:, 1:] = lens
    return (
        *token_arrays(batch, size, table),
        singles.slots,
        singles.context_lens,
        slots,
        np.cumsum(bounds, axis=1, dtype=np.int32),
    )


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # [bytes] uint8, packed as ``step_arrays``
    most_rows: int


class WholeGraphs:
    """Captures on demand, or all sizes ahead with ``capture_all``."""

    def __init__(
        self,
        model: Model,
        table: SlotTable,
        new_workspace: Callable[[int], DecodeWorkspace],
        *,
        max_tokens: int,
        worth: int,
    ) -> None:
        """Steps have up to ``max_tokens``. One long chunk of more than ``worth`` tokens
        is not padded."""
        self._model = model
        self._table = table
        self._sizes = chunk_sizes(max_tokens, _MOST_BESIDE)
        self._worth = worth
        self._most_context = min(_GATHERED_CONTEXT, table.max_context)
        self._captured: dict[tuple[Kind, int], _Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()
        self._most_rows = min(table.scratch, _MOST_BESIDE)
        self._workspace = new_workspace(self._most_rows)  # steps run one after the other
        most = self._sizes[-1] if self._sizes else 0
        weights = model.weights
        self._left = weights.embedding.new_zeros(  # [most, hidden]
            most, model.shape.hidden_size, dtype=weights.final_norm.dtype
        )

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Of steps with a batch."""
        return tuple(size for size in self._sizes if size <= _MOST_BESIDE)

    def size_for(self, batch: Batch) -> tuple[Kind, int] | None:
        """The graph in which the step runs, if any."""
        at = bisect_left(self._sizes, batch.num_tokens)
        if at == len(self._sizes):
            return None
        size = self._sizes[at]
        kind = kind_of(batch, size, self._most_context)
        if kind is Kind.BEHIND and size > self._worth and size != batch.num_tokens:
            return None
        return None if kind is None else (kind, size)

    def capture_all(self) -> None:
        """The largest first: the smaller ones fit into its memory."""
        wanted = [
            (kind, size)
            for size in reversed(self._sizes)
            for kind in Kind
            if kind.holds(size, self._most_context)
        ]
        with Progress("capturing steps with prompts", len(wanted)) as progress:
            for key in wanted:
                self._at(*key)
                progress.advance(1)

    def run(self, batch: Batch, key: tuple[Kind, int], at: Tensor) -> Tensor:
        """The last layer's normed output ``[S, hidden]`` for the tokens ``at[S]``."""
        captured = self._at(*key)
        arrays = step_arrays(batch, key[1], captured.most_rows, self._table)
        captured.inputs.copy_(pack(arrays), non_blocking=True)
        captured.graph.replay()
        return self._model.final_norm(self._left.index_select(0, at))

    def _at(self, kind: Kind, size: int) -> _Captured:
        key = kind, size
        if key not in self._captured:
            self._captured[key] = self._capture(kind, size)
        return self._captured[key]

    def _capture(self, kind: Kind, size: int) -> _Captured:
        most_rows = min(size, self._most_rows) if kind is Kind.BESIDE else 0
        empty = step_arrays(Batch.none(), size, most_rows, self._table)
        inputs = pack(empty).to(self._left.device)
        views = unpack(inputs, empty)
        # Kernels are compiled and libraries set up by their first call, which a capture refuses.
        side = torch.cuda.Stream(inputs.device)
        side.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(side):
            self._step(kind, views)
        torch.cuda.current_stream(inputs.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            self._step(kind, views)
        return _Captured(graph, inputs, most_rows)

    def _step(self, kind: Kind, views: Sequence[Tensor]) -> None:
        """The model over padded inputs, into ``_left``. All that it reads stays at its address."""
        index, positions, cache_slots, slots, context_lens, chunk_slots, bounds = views
        size, tables = len(index), self._table.block_tables
        if kind is not Kind.BEHIND:
            if len(slots):
                self._workspace.prepare(tables.index_select(0, slots), context_lens)
            chunks = PrefillBatch.captured(
                tables.index_select(0, chunk_slots),
                bounds,
                size,
                self._table.max_context,
                placed=True,
            )
        else:
            # The first of the chunks and the only one.
            chunks = PrefillBatch.captured(
                tables.index_select(0, chunk_slots[:1]),
                bounds[:, :2].contiguous(),
                size,
                self._most_context,
            )
        ids = self._table.token_ids.view(-1).index_select(0, index)
        self._model.pass_through(
            Tokens(ids, positions, cache_slots),
            Attention(len(slots), self._workspace, chunks),
            self._left[:size],
        )
