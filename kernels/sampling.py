"""Drawing the next token of every row.

Order: penalties, logit bias, temperature, top-k, top-p, min-p, and then the Gumbel-max
trick (the arg max of logit + Gumbel noise is a draw from the softmax) on what is left, with
counter-based noise: see ``noise``. Every cut keeps a set of the form "scaled logit at least
t", ties included:

- top-k: t is the k-th largest value.
- top-p (nucleus sampling, Holtzman et al., 2019): t is the smallest value such that the
  entries strictly above it hold less than ``top_p`` of the mass that top-k has left.
- min-p (Nguyen et al., 2024): t is ``max + log(min_p)``.

So a cut is a search for a number, and needs no sort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .noise import gumbel, noise_key

CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class RowParams:
    """Sampling parameters, one entry a row; meanings as in ``core.params.SamplingParams``.

    ``position`` is the index in the output of the token to be drawn; ``has_cuts`` is False only
    where no row has a top-k, top-p or min-p.
    """

    temperature: Tensor  # [B] fp32
    top_k: Tensor  # [B] int32, 0 = off
    top_p: Tensor  # [B] fp32
    min_p: Tensor  # [B] fp32
    repetition_penalty: Tensor  # [B] fp32
    presence_penalty: Tensor  # [B] fp32
    frequency_penalty: Tensor  # [B] fp32
    seed: Tensor  # [B] int64
    choice: Tensor  # [B] int64
    position: Tensor  # [B] int64
    has_cuts: bool = field(default=True, kw_only=True)


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """What the penalties look at: each row's prompt and output so far, in its slot."""

    token_ids: Tensor  # [max_slots, max_context] int32
    slots: Tensor  # [B] int64
    prompt_lens: Tensor  # [B] int32
    total_lens: Tensor  # [B] int32, prompt + output so far


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Sparse additions to the logits; ``-inf`` forbids a token."""

    rows: Tensor  # [N] int64
    token_ids: Tensor  # [N] int64
    values: Tensor  # [N] fp32


def sample(
    logits: Tensor,
    params: RowParams | None,
    history: TokenHistory | None = None,
    bias: LogitBias | None = None,
) -> Tensor:
    """Returns the token ids ``[B]`` int64 drawn from ``logits[B, V]`` (fp32 or 16-bit).

    - ``params`` None: every row is greedy, without penalties (the caller knows): an arg max.
    - ``history`` None: no row has penalties. Else all tokens of the history are counted.
    - ``bias`` None: no row has a bias or a forbidden token.

    Temperature 0 is the arg max after penalties and bias, the lowest index on a tie.
    ``logits`` is left as it is.
    """
    if params is None:
        if bias is not None:
            logits = add_bias(logits.float(), bias)
        if logits.is_cuda:
            from .gpu.sampling import arg_max

            return arg_max(logits)
        return logits.argmax(dim=-1)
    if logits.is_cuda:
        from .gpu.sampling import sample as launch

        return launch(logits, params, history, bias)
    return sample_reference(logits, params, history, bias)


def add_bias(logits: Tensor, bias: LogitBias) -> Tensor:
    """``logits[B, V]`` fp32 with the sparse additions, in a new tensor."""
    return logits.index_put((bias.rows, bias.token_ids), bias.values, accumulate=True)


def log_probs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under the unmodified distribution, fp32.

    ``logits[B, V]`` raw; ``token_ids[B]`` drawn. Returns ``(chosen[B], top_ids[B, num_top],
    top[B, num_top])``, the most likely first.
    """
    scores = torch.log_softmax(logits.float(), dim=-1)  # [B, V]
    chosen = scores.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    top, top_ids = scores.topk(num_top, dim=-1)
    return chosen, top_ids, top


def sample_reference(
    logits: Tensor, params: RowParams, history: TokenHistory | None, bias: LogitBias | None
) -> Tensor:
    """The same in plain torch, a row at a time: what a row needs differs, and it fits the cache."""
    logits = logits.to(torch.float32, copy=history is not None or bias is not None)  # [B, V]
    if history is not None:
        penalize(logits, params, history)
    if bias is not None:
        logits = add_bias(logits, bias)
    tokens = logits.argmax(dim=-1)  # [B]
    temperature: list[float] = params.temperature.tolist()
    top_k: list[int] = params.top_k.tolist()
    top_p: list[float] = params.top_p.tolist()
    min_p: list[float] = params.min_p.tolist()
    counters = zip(
        params.seed.tolist(), params.choice.tolist(), params.position.tolist(), strict=True
    )
    for row, (seed, choice, position) in enumerate(counters):
        if temperature[row] > 0:
            values = logits[row] / temperature[row]  # [V]
            ids = torch.arange(values.shape[0], dtype=torch.int32)
            if top_k[row] > 0 or top_p[row] < 1 or min_p[row] > 0:
                values, ids = cut(values, top_k[row], top_p[row], min_p[row])
            noisy = gumbel(noise_key(seed, choice, position), ids).add_(values)
            tokens[row] = ids[noisy.argmax()]
    return tokens


def penalize(logits: Tensor, params: RowParams, history: TokenHistory) -> None:
    """Repetition, presence and frequency penalties, in place on ``logits[B, V]`` fp32.

    Repetition (Keskar et al., 2019) looks at prompt and output, the other two (OpenAI's) at
    the output only.
    """
    repetition: list[float] = params.repetition_penalty.tolist()
    presence: list[float] = params.presence_penalty.tolist()
    frequency: list[float] = params.frequency_penalty.tolist()
    slots: list[int] = history.slots.tolist()
    prompt_lens: list[int] = history.prompt_lens.tolist()
    total_lens: list[int] = history.total_lens.tolist()
    for row, slot in enumerate(slots):
        if repetition[row] != 1:
            seen = torch.unique(history.token_ids[slot, : total_lens[row]]).long()
            old = logits[row, seen]
            new = torch.where(old > 0, old / repetition[row], old * repetition[row])
            logits[row, seen] = new
        if presence[row] != 0 or frequency[row] != 0:
            output = history.token_ids[slot, prompt_lens[row] : total_lens[row]]
            used, counts = torch.unique(output, return_counts=True)
            logits[row, used.long()] -= frequency[row] * counts + presence[row]


def cut(values: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """What the cuts leave of ``values[V]``: ``(values[n], ids[n] int32)``, falling.

    Works on the largest values, and on more of them only where those do not reach below the
    threshold.
    """
    size = values.shape[0]
    total = None if top_k > 0 else (values - values.max()).exp_().sum()
    for number in (CANDIDATES, 16 * CANDIDATES, size):
        number = min(max(number, top_k + 1), size)
        top, ids = values.topk(number)  # [number] each
        threshold = find_threshold(top, total, top_k, top_p, min_p)
        if number == size or threshold > top[-1]:
            break
    kept = top >= threshold
    return top[kept], ids[kept].to(torch.int32)


def find_threshold(
    top: Tensor, total: Tensor | None, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """The least value to keep, as far as ``top[n]``, the largest values, falling, can tell.

    ``total`` is the mass of all values relative to ``exp(top[0])``, None with ``top_k``.
    """
    threshold = top[min(top_k, top.shape[0]) - 1]  # with top_k 0 the last one
    if top_p < 1:
        mass = (top - top[0]).exp_().masked_fill_(top < threshold, 0).cumsum(dim=0)  # [n]
        # The entry at which the mass is reached still belongs to the nucleus.
        reached = mass < top_p * (mass[-1] if total is None else total)
        last = min(int(reached.sum()), top.shape[0] - 1)
        threshold = torch.maximum(threshold, top[last])
    if min_p > 0:
        threshold = torch.maximum(threshold, top[0] + math.log(min_p))
    return threshold
