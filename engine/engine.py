"""The engine on torch: step plans in, token ids out.

    launch   take in new sequences and blocks -> describe the batch -> run the model
             -> draw -> write the drawn tokens into the slots
    wait     the drawn tokens as plain data

On a GPU ``launch`` only enqueues: nothing in it waits for the device. The next step's input
tokens are read from the slots on the device, where the last step has written them. On a CPU
the step is over when ``launch`` returns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.plan import EngineLimits, KvPool, StepHandle, StepPlan, StepResult
from ..kernels.decode_attention import DecodeWorkspace
from ..kernels.prefill_attention import PrefillBatch
from .batch import Batch, describe, token_arrays
from .chunk_graphs import ChunkGraphs
from .device import Precision
from .graphs import DecodeGraphs
from .model import Attention, Model, Tokens
from .sampler import Drawn, LogProbs, Sampler, step_result
from .shape import ModelShape
from .slots import SlotTable
from .upload import Upload
from .weights import ModelWeights
from .whole_graphs import WholeGraphs


class TorchEngine:
    """Implements ``core.plan.Engine``. Steps run in the order in which they are launched."""

    def __init__(
        self,
        *,
        model: Model,
        table: SlotTable,
        sampler: Sampler,
        new_workspace: Callable[[int], DecodeWorkspace],
        kv: KvPool,
        limits: EngineLimits,
        upload: Upload,
        precision: Precision,
        graphs: DecodeGraphs | None,
        whole_graphs: WholeGraphs | None,
        chunk_graphs: ChunkGraphs | None,
    ) -> None:
        """``graphs`` are for decode steps on a GPU, the others for those that read prompts, as far
        as one graph can hold them; without them each kernel is launched."""
        self.kv = kv
        self.limits = limits
        self.precision = precision
        self._model = model
        self._table = table
        self._sampler = sampler
        self._workspace = new_workspace(limits.max_slots)
        self._upload = upload
        self._graphs = graphs
        self._whole_graphs = whole_graphs
        self._chunk_graphs = chunk_graphs

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepHandle:
        assert plan.rows and plan.num_tokens <= self.limits.max_step_tokens, plan.num_tokens
        self._table.apply(plan)
        batch = describe(plan, self._table)
        rows = batch.sampled
        if not len(rows):
            self._run(batch)
            drawn = Drawn(torch.empty(0, dtype=torch.int64), None)
        else:
            drawn = self._sampler.draw(self._run(batch), rows)
            (written_to,) = self._upload((rows.written_to,))
            self._table.token_ids.view(-1).index_copy_(0, written_to, drawn.token_ids.int())
        asked = tuple(self._table.params_of(slot).logprobs for slot in rows.slots)
        if self._table.token_ids.is_cuda:
            return PendingStep(rows.slots, asked, drawn)
        return DoneStep(step_result(rows.slots, asked, drawn))

    @property
    def shape(self) -> ModelShape:
        return self._model.shape

    @property
    def weights(self) -> ModelWeights:
        return self._model.weights

    @property
    def kv_blocks(self) -> Tensor:
        """``[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]``."""
        return self._model.kv_blocks

    def close(self) -> None:
        """Waits for the steps that are launched; the memory goes with the engine."""
        if self._table.token_ids.is_cuda:
            torch.cuda.synchronize(self._table.token_ids.device)
        self.kv.close()

    def _run(self, batch: Batch) -> Tensor:
        """The model over the batch: logits ``[S, vocab]`` of the sampled rows."""
        if self._graphs is not None and batch.all_sampled:
            return self._graphs.run(batch.singles)
        whole = self._whole_graphs
        if whole is not None and (key := whole.size_for(batch)) is not None:
            (sampled_at,) = self._upload((batch.sampled.at,))
            return self._model.logits(whole.run(batch, key, sampled_at))
        attention, at = self._attention(batch)
        chunk_graphs = self._chunk_graphs
        size = chunk_graphs.size_for(batch.num_tokens) if chunk_graphs is not None else None
        if chunk_graphs is not None and size is not None:
            hidden = chunk_graphs.run(batch, size, attention, at)
        else:
            arrays = token_arrays(batch, batch.num_tokens, self._table)
            token_index, positions, cache_slots = self._upload(arrays)
            ids = self._table.token_ids.view(-1).index_select(0, token_index)
            hidden = self._model.hidden(Tokens(ids, positions, cache_slots), attention, at)
        return self._model.logits(hidden)

    def _attention(self, batch: Batch) -> tuple[Attention, Tensor | None]:
        """How the batch attends, and which of its tokens are sampled after (None: all)."""
        singles, chunks = batch.singles, batch.chunks
        slots, lens, chunk_slots, at = self._upload(
            (singles.slots, singles.context_lens, chunks.slots, batch.sampled.at)
        )
        tables = self._table.block_tables
        if len(singles):
            self._workspace.prepare(tables.index_select(0, slots), lens)
        prefill = None
        if len(chunks):
            prefill = PrefillBatch.create(
                tables.index_select(0, chunk_slots), chunks.new_lens, chunks.context_lens
            )
        attention = Attention(len(singles), self._workspace, prefill)
        return attention, None if batch.all_sampled else at


class DoneStep:
    """A step whose result is there."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result

    @property
    def done(self) -> bool:
        return True


class PendingStep:
    """A step on a GPU: its tokens are on their way into pinned memory."""

    def __init__(self, slots: tuple[int, ...], asked: tuple[int | None, ...], drawn: Drawn) -> None:
        self._slots = slots
        self._asked = asked
        logprobs = drawn.logprobs
        self._drawn = Drawn(
            _to_host(drawn.token_ids),
            None
            if logprobs is None
            else LogProbs(logprobs.rows, *(_to_host(tensor) for tensor in logprobs.tensors)),
        )
        self._done = torch.cuda.Event()
        self._done.record()
        self._result: StepResult | None = None

    def wait(self) -> StepResult:
        if self._result is None:
            self._done.synchronize()
            self._result = step_result(self._slots, self._asked, self._drawn)
        return self._result

    @property
    def done(self) -> bool:
        return self._result is not None or self._done.query()


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, complete when the stream has come so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
