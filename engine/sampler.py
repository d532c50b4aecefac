"""From logits to token ids, by the sampling parameters of the slots that draw.

All sampling state is a function of prompt, output so far and parameters, and all but the
output's tokens is known on the host: so the parameters travel with the step, and only the
penalties read the slots' token buffers on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..core.params import SamplingParams
from ..core.plan import SampledToken, StepResult
from ..kernels.sampling import LogitBias, RowParams, TokenHistory, log_probs, sample
from .batch import SampledRows
from .slots import SlotTable
from .upload import Array, Upload


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew, still on the device; ``None`` where nobody asked."""

    token_ids: Tensor  # [S] int64
    logprobs: LogProbs | None


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Of the rows that asked: ``rows`` counts among the sampled ones."""

    rows: tuple[int, ...]
    chosen: Tensor  # [R] fp32
    top_ids: Tensor  # [R, most] int64
    top: Tensor  # [R, most] fp32

    @property
    def tensors(self) -> list[Tensor]:
        return [self.chosen, self.top_ids, self.top]


class Sampler:
    """Draws for rows of a ``SlotTable``."""

    def __init__(self, table: SlotTable, eos_token_ids: tuple[int, ...], upload: Upload) -> None:
        self._table = table
        self._eos = eos_token_ids
        self._upload = upload

    def draw(self, logits: Tensor, rows: SampledRows) -> Drawn:
        """``logits[S, vocab]`` of the sampled rows, which stay as they are."""
        params = [self._table.params_of(slot) for slot in rows.slots]
        plain = all(row.greedy and not row.penalized for row in params)
        token_ids = sample(
            logits,
            None if plain else self._row_params(rows, params),
            self._history(rows) if any(row.penalized for row in params) else None,
            self._bias(rows, params),
        )
        return Drawn(token_ids, self._log_probs(logits, token_ids, params))

    def _row_params(self, rows: SampledRows, params: list[SamplingParams]) -> RowParams:
        def column(dtype: type, value: Callable[[SamplingParams], float]) -> Array:
            return np.array([value(row) for row in params], dtype)

        prompt_lens = self._table.num_prompt_tokens[list(rows.slots)]
        return RowParams(
            *self._upload(
                (
                    column(np.float32, lambda row: row.temperature),
                    column(np.int32, lambda row: min(row.top_k, self._table.vocab_size)),
                    column(np.float32, lambda row: row.top_p),
                    column(np.float32, lambda row: row.min_p),
                    column(np.float32, lambda row: row.repetition_penalty),
                    column(np.float32, lambda row: row.presence_penalty),
                    column(np.float32, lambda row: row.frequency_penalty),
                    column(np.int64, lambda row: row.seed),
                    column(np.int64, lambda row: row.choice),
                    rows.total_lens - prompt_lens,
                )
            ),
            has_cuts=any(row.top_k > 0 or row.top_p < 1 or row.min_p > 0 for row in params),
        )

    def _history(self, rows: SampledRows) -> TokenHistory:
        slots = np.array(rows.slots, np.int64)
        prompt_lens = self._table.num_prompt_tokens[slots].astype(np.int32)
        uploaded = self._upload((slots, prompt_lens, rows.total_lens.astype(np.int32)))
        return TokenHistory(self._table.token_ids, *uploaded)

    def _bias(self, rows: SampledRows, params: list[SamplingParams]) -> LogitBias | None:
        """Biases asked for, and end tokens forbidden before ``min_tokens``."""
        entries: list[tuple[int, int, float]] = []
        for index, (row, total) in enumerate(zip(params, rows.total_lens.tolist(), strict=True)):
            entries += [(index, token_id, value) for token_id, value in row.logit_bias]
            num_output = total - int(self._table.num_prompt_tokens[rows.slots[index]])
            if num_output < row.min_tokens:
                ends = {*self._eos, *row.stop_token_ids}
                entries += [(index, token_id, -math.inf) for token_id in sorted(ends)]
        entries = [entry for entry in entries if entry[1] < self._table.vocab_size]
        if not entries:
            return None
        at, token_ids, values = zip(*entries, strict=True)
        return LogitBias(
            *self._upload(
                (
                    np.array(at, np.int64),
                    np.array(token_ids, np.int64),
                    np.array(values, np.float32),
                )
            )
        )

    def _log_probs(
        self, logits: Tensor, token_ids: Tensor, params: list[SamplingParams]
    ) -> LogProbs | None:
        asked = tuple(index for index, row in enumerate(params) if row.logprobs is not None)
        if not asked:
            return None
        most = max(params[index].logprobs or 0 for index in asked)
        if len(asked) < len(params):
            (index,) = self._upload((np.array(asked, np.int64),))
            logits, token_ids = logits.index_select(0, index), token_ids.index_select(0, index)
        return LogProbs(asked, *log_probs(logits, token_ids, most))


def step_result(slots: tuple[int, ...], params: tuple[int | None, ...], drawn: Drawn) -> StepResult:
    """``drawn`` on the host as plain data; ``params`` are the slots' ``logprobs``."""
    tokens = [
        SampledToken(slot, token_id)
        for slot, token_id in zip(slots, drawn.token_ids.tolist(), strict=True)
    ]
    if drawn.logprobs is not None:
        found = drawn.logprobs
        lists = (found.chosen.tolist(), found.top_ids.tolist(), found.top.tolist())
        for row, chosen, top_ids, top in zip(found.rows, *lists, strict=True):
            pairs = tuple(zip(top_ids, top, strict=True))[: params[row]]
            tokens[row] = SampledToken(slots[row], tokens[row].token_id, chosen, pairs)
    return StepResult(tuple(tokens))
