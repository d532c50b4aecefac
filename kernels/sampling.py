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
from dataclasses import dataclass

import torch
from torch import Tensor

from .noise import gumbel, noise_keys

TOP_P_CANDIDATES = 1024


@dataclass(frozen=True, slots=True)
class RowParams:
    """Sampling parameters, one entry a row; meanings as in ``core.params.SamplingParams``.

    ``position`` is the index in the output of the token to be drawn.
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
    """The same in plain torch."""
    logits = logits.float()  # [B, V]
    if history is not None:
        logits = penalize(logits, params, history)
    if bias is not None:
        logits = add_bias(logits, bias)
    greedy = params.temperature == 0  # [B]
    if bool(greedy.all()):
        return logits.argmax(dim=-1)
    temperature = torch.where(greedy, 1.0, params.temperature)
    scaled = logits / temperature.unsqueeze(1)  # [B, V]

    threshold = cut(scaled, params)  # [B, 1]
    keys = noise_keys(params.seed, params.choice, params.position).unsqueeze(1)  # [B, 1]
    index = torch.arange(logits.shape[1], dtype=torch.int32).unsqueeze(0)  # [1, V]
    noisy = scaled + gumbel(keys, index)
    noisy.masked_fill_(scaled < threshold, -math.inf)
    drawn = noisy.argmax(dim=-1)
    return torch.where(greedy, logits.argmax(dim=-1), drawn) if bool(greedy.any()) else drawn


def penalize(logits: Tensor, params: RowParams, history: TokenHistory) -> Tensor:
    """Repetition, presence and frequency penalties, in a new tensor.

    Repetition (Keskar et al., 2019) looks at prompt and output, the other two (OpenAI's) at
    the output only.
    """
    tokens = history.token_ids.index_select(0, history.slots).long()  # [B, max_context]
    at = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    used = at < history.total_lens.unsqueeze(1)
    output = used & (at >= history.prompt_lens.unsqueeze(1))
    tokens = tokens.where(used, 0)  # past the end the buffer holds anything
    seen = torch.zeros_like(logits).scatter_add_(1, tokens, used.to(logits.dtype))
    counts = torch.zeros_like(logits).scatter_add_(1, tokens, output.to(logits.dtype))

    factor = params.repetition_penalty.unsqueeze(1).where(seen > 0, 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    logits -= params.frequency_penalty.unsqueeze(1) * counts
    logits -= params.presence_penalty.unsqueeze(1) * (counts > 0)
    return logits


def cut(scaled: Tensor, params: RowParams) -> Tensor:
    """The value ``[B, 1]`` that an entry of ``scaled[B, V]`` must reach to be drawn."""
    size = scaled.shape[1]
    threshold = torch.full((scaled.shape[0], 1), -math.inf)
    has_k = (params.top_k > 0) & (params.top_k < size)
    has_p = params.top_p < 1
    has_min_p = params.min_p > 0
    if not bool((has_k | has_p | has_min_p).any()):
        return threshold

    wanted = max(int(params.top_k.where(has_k, 0).max()), 1)
    if bool(has_p.any()):
        wanted = max(wanted, min(TOP_P_CANDIDATES, size))
    top = scaled.topk(wanted, dim=-1).values  # [B, wanted], falling
    if bool(has_k.any()):
        kth = top.gather(1, params.top_k.where(has_k, 1).long().unsqueeze(1) - 1)
        threshold = kth.where(has_k.unsqueeze(1), threshold)
    if bool(has_p.any()):
        weights = (scaled - top[:, :1]).exp_().masked_fill_(scaled < threshold, 0)
        mass = params.top_p.unsqueeze(1) * weights.sum(dim=-1, keepdim=True)  # [B, 1]
        nucleus = nucleus_threshold(top, threshold, mass)
        if bool((has_p & nucleus.isnan().squeeze(1)).any()):
            everything = scaled.sort(dim=-1, descending=True).values
            nucleus = nucleus_threshold(everything, threshold, mass)
        threshold = nucleus.where(has_p.unsqueeze(1), threshold)
    if bool(has_min_p.any()):
        floor = top[:, :1] + params.min_p.log().unsqueeze(1)  # log 0 = -inf: off
        threshold = torch.maximum(threshold, floor)
    return threshold


def nucleus_threshold(top: Tensor, threshold: Tensor, mass: Tensor) -> Tensor:
    """The smallest value with less than ``mass`` strictly above it; NaN where it lies past ``top``.

    ``top[B, n]`` are the largest values, falling; ``threshold, mass[B, 1]``; the mass is
    relative to ``exp(top[:, 0])``.
    """
    weights = (top - top[:, :1]).exp().masked_fill_(top < threshold, 0)
    upto = weights.cumsum(dim=-1)  # [B, n]
    reached = upto >= mass
    # The first entry at which the mass is reached still belongs to the nucleus.
    last = reached.to(torch.uint8).argmax(dim=-1, keepdim=True)  # [B, 1]
    value = top.gather(1, last)
    return value.where(reached.any(dim=-1, keepdim=True), math.nan)
