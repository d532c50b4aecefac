"""Sampling without a sort: thresholds by bisection, then the best of the noisy logits.

    penalties    two launches, where a row has some: count the tokens, then apply
    cuts         one, where a row has some: a program a row finds the value below which nothing
                 is drawn
    draw         two: many programs a row find the best of their stretch, then one the best

Each pass of a bisection halves the range of values and then moves its ends to values that
occur, so that it ends on the exact one. The sums are of non-negative numbers in a fixed order,
hence monotone in the threshold and equal for a row whatever else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..noise import (
    GOLDEN,
    LARGEST_UNIFORM,
    LOW_BIAS_1,
    LOW_BIAS_2,
    SPLIT_MIX_1,
    SPLIT_MIX_2,
)
from ..sampling import LogitBias, RowParams, TokenHistory, add_bias

_BLOCK = 4096
_CUT_BLOCK = 8192
_HISTORY_BLOCK = 1024
_IN_PROMPT = tl.constexpr(1 << 30)  # flag in a count: the token is in the prompt

_GOLDEN = tl.constexpr(GOLDEN)
_SPLIT_MIX_1 = tl.constexpr(SPLIT_MIX_1)
_SPLIT_MIX_2 = tl.constexpr(SPLIT_MIX_2)
_LOW_BIAS_1 = tl.constexpr(LOW_BIAS_1)
_LOW_BIAS_2 = tl.constexpr(LOW_BIAS_2)
_LARGEST_UNIFORM = tl.constexpr(LARGEST_UNIFORM)


@triton.jit
def _count_kernel(
    token_ids_ptr,
    slots_ptr,
    prompt_lens_ptr,
    total_lens_ptr,
    counts_ptr,
    history_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(total_lens_ptr + row)
    if tl.program_id(1) * BLOCK < total:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        token = tl.load(token_ids_ptr + slot * history_stride + at, mask=at < total, other=0)
        count = counts_ptr + row * vocab + token
        in_prompt = at < tl.load(prompt_lens_ptr + row)
        tl.atomic_or(count, _IN_PROMPT, mask=in_prompt & (at < total))
        tl.atomic_add(count, 1, mask=(at >= tl.load(prompt_lens_ptr + row)) & (at < total))


@triton.jit
def _penalize_kernel(
    logits_ptr,
    counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    out_ptr,
    logits_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    logit = tl.load(logits_ptr + row * logits_stride + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(counts_ptr + row * vocab + at, mask=inside, other=0)
    factor = tl.where(count != 0, tl.load(repetition_ptr + row), 1.0)
    logit = tl.where(logit > 0, logit / factor, logit * factor)
    used = (count & (_IN_PROMPT - 1)).to(tl.float32)
    present = tl.where(used > 0, tl.load(presence_ptr + row), 0.0)
    logit -= tl.load(frequency_ptr + row) * used + present
    tl.store(out_ptr + row * vocab + at, logit, mask=inside)


@triton.jit
def _split_mix(x):
    x = x + _GOLDEN
    x = (x ^ (x >> 30)) * _SPLIT_MIX_1
    x = (x ^ (x >> 27)) * _SPLIT_MIX_2
    return x ^ (x >> 31)


@triton.jit
def noise_key(seed, choice, position):
    """See ``kernels.noise.noise_key``; a ``uint64`` scalar."""
    key = _split_mix(seed.to(tl.uint64))
    key = _split_mix(key ^ choice.to(tl.uint64))
    return _split_mix(key ^ position.to(tl.uint64))


@triton.jit
def hash_entries(key, index):
    """See ``kernels.noise.hash_entries``; ``index[N]``, the bits as ``int32``."""
    h = index.to(tl.uint32) ^ key.to(tl.uint32)
    h = (h ^ (h >> 16)) * _LOW_BIAS_1
    h = h ^ (h >> 15) ^ (key >> 32).to(tl.uint32)
    h = h * _LOW_BIAS_2
    return (h ^ (h >> 16)).to(tl.int32, bitcast=True)


@triton.jit
def gumbel(key, index):
    """See ``kernels.noise.gumbel``."""
    u = tl.abs(hash_entries(key, index).to(tl.float32)) * 4.656612873077393e-10  # 2 ** -31
    u = tl.minimum(tl.maximum(u, 2.3283064365386963e-10), _LARGEST_UNIFORM)
    # -log(1 - u): for small u by its series, where 1 - u would lose what tells them apart.
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * (0.2 + u * 0.16666667)))))
    return -tl.log(tl.where(u < 0.03125, series, -tl.log(1.0 - u)))


@triton.jit
def _threshold(
    logits_ptr,
    vocab,
    divisor,
    peak,
    lowest,
    wanted,
    COUNTING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest value with less than ``wanted`` strictly above it, among those >= ``lowest``.

    ``wanted`` counts entries (``COUNTING``) or mass relative to ``exp(peak)``; ``peak`` is the
    largest value.
    """
    # Above high there is less than wanted, and high is a value; above low there is not.
    high = peak
    low = lowest - 1.0
    searching = low < high
    while searching:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle < high, middle, low)  # low and high may be neighbours
        above = tl.zeros([BLOCK], tl.float32)
        next_above = tl.full([BLOCK], float("inf"), tl.float32)
        next_below = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in tl.range(0, vocab, BLOCK):
            value = _scaled(logits_ptr, start + tl.arange(0, BLOCK), vocab, divisor)
            over = (value > middle) & (value >= lowest)
            weight = 1.0 if COUNTING else tl.exp(value - peak)
            above += tl.where(over, weight, 0.0)
            next_above = tl.minimum(next_above, tl.where(over, value, float("inf")))
            under = (value >= lowest) & (value <= middle)
            next_below = tl.maximum(next_below, tl.where(under, value, float("-inf")))
        less = tl.sum(above, axis=0) < wanted
        least_above = tl.minimum(tl.min(next_above, axis=0), high)
        most_below = tl.maximum(tl.max(next_below, axis=0), low)
        searching = less | (least_above < high)
        high = tl.where(less, most_below, high)
        low = tl.where(less, low, middle)
        searching = searching & (low < high)
    return high


@triton.jit
def _scaled(logits_ptr, at, vocab, divisor):
    """The logits over the temperature, in fp32; nothing past the vocabulary."""
    logit = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf"))
    return logit.to(tl.float32) / divisor


@triton.jit
def _cut_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    threshold_ptr,
    logits_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    threshold = float("-inf")
    counted = (top_k > 0) & (top_k < vocab)
    if (temperature > 0) & (counted | (top_p < 1) | (min_p > 0)):
        peaks = tl.full([BLOCK], float("-inf"), tl.float32)
        lows = tl.full([BLOCK], float("inf"), tl.float32)
        for start in tl.range(0, vocab, BLOCK):
            value = _scaled(logits_ptr, start + tl.arange(0, BLOCK), vocab, temperature)
            peaks = tl.maximum(peaks, value)
            lows = tl.minimum(lows, tl.where(value == float("-inf"), float("inf"), value))
        peak = tl.max(peaks, axis=0)
        threshold = tl.min(lows, axis=0)
        if counted:
            wanted = top_k.to(tl.float32)
            threshold = _threshold(
                logits_ptr, vocab, temperature, peak, threshold, wanted, True, BLOCK
            )
        if top_p < 1:
            masses = tl.zeros([BLOCK], tl.float32)
            for start in tl.range(0, vocab, BLOCK):
                value = _scaled(logits_ptr, start + tl.arange(0, BLOCK), vocab, temperature)
                masses += tl.where(value >= threshold, tl.exp(value - peak), 0.0)
            wanted = top_p * tl.sum(masses, axis=0)
            threshold = _threshold(
                logits_ptr, vocab, temperature, peak, threshold, wanted, False, BLOCK
            )
        if min_p > 0:
            threshold = tl.maximum(threshold, peak + tl.log(min_p))
    tl.store(threshold_ptr + row, threshold)


@triton.jit
def _stretch_kernel(
    logits_ptr,
    temperature_ptr,
    threshold_ptr,
    seed_ptr,
    choice_ptr,
    position_ptr,
    best_ptr,
    token_ptr,
    logits_stride,
    vocab,
    BLOCK: tl.constexpr,
    GREEDY: tl.constexpr,
    CUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    at = start + tl.arange(0, BLOCK)
    logits_ptr += row * logits_stride
    noisy = _scaled(logits_ptr, at, vocab, 1.0)
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0:
            key = noise_key(
                tl.load(seed_ptr + row), tl.load(choice_ptr + row), tl.load(position_ptr + row)
            )
            value = noisy / temperature
            noisy = value + gumbel(key, at)
            if CUT:
                noisy = tl.where(value >= tl.load(threshold_ptr + row), noisy, float("-inf"))
    best, where = tl.max(noisy, axis=0, return_indices=True)
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + out, best)
    tl.store(token_ptr + out, start + where)


@triton.jit
def _best_kernel(best_ptr, token_ptr, out_ptr, stretches, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    best = tl.load(best_ptr + row * stretches + at, mask=at < stretches, other=float("-inf"))
    _, where = tl.max(best, axis=0, return_indices=True)
    token = tl.load(token_ptr + row * stretches + where)
    tl.store(out_ptr + row, token.to(tl.int64))


def sample(
    logits: Tensor, params: RowParams, history: TokenHistory | None, bias: LogitBias | None
) -> Tensor:
    """See ``kernels.sampling.sample``. Grid of the cuts: (B,)."""
    rows, vocab = logits.shape
    if history is not None:
        logits = penalize(logits, params, history)
    if bias is not None:
        logits = add_bias(logits.float(), bias)
    threshold = None
    if params.has_cuts:
        threshold = torch.empty(rows, device=logits.device)  # fp32
        _cut_kernel[(rows,)](
            logits,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            threshold,
            logits.stride(0),
            vocab,
            BLOCK=_CUT_BLOCK,
            num_warps=16,
        )
    return _draw(logits, params, threshold)


def arg_max(logits: Tensor) -> Tensor:
    """``logits[B, V]`` -> ``[B]`` int64, the first of the largest."""
    return _draw(logits, None, None)


def _draw(logits: Tensor, params: RowParams | None, threshold: Tensor | None) -> Tensor:
    """Grids: (B, V / BLOCK) and (B,)."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    stretches = triton.cdiv(vocab, _BLOCK)
    best = torch.empty((rows, stretches), device=logits.device)  # fp32
    tokens = torch.empty((rows, stretches), dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _stretch_kernel[(rows, stretches)](
        logits,
        params.temperature if params is not None else None,
        threshold,
        params.seed if params is not None else None,
        params.choice if params is not None else None,
        params.position if params is not None else None,
        best,
        tokens,
        logits.stride(0),
        vocab,
        BLOCK=_BLOCK,
        GREEDY=params is None,
        CUT=threshold is not None,
        num_warps=4,
    )
    _best_kernel[(rows,)](
        best, tokens, out, stretches, BLOCK=triton.next_power_of_2(stretches), num_warps=1
    )
    return out


def penalize(logits: Tensor, params: RowParams, history: TokenHistory) -> Tensor:
    """Repetition, presence and frequency penalties: ``[B, V]`` in fp32, a new tensor.

    Grids: (B, max_context / BLOCK) and (B, V / BLOCK).
    """
    rows, vocab = logits.shape
    counts = torch.zeros((rows, vocab), dtype=torch.int32, device=logits.device)
    _count_kernel[(rows, triton.cdiv(history.token_ids.shape[1], _HISTORY_BLOCK))](
        history.token_ids,
        history.slots,
        history.prompt_lens,
        history.total_lens,
        counts,
        history.token_ids.stride(0),
        vocab,
        BLOCK=_HISTORY_BLOCK,
        num_warps=4,
    )
    out = torch.empty((rows, vocab), device=logits.device)  # fp32
    _penalize_kernel[(rows, triton.cdiv(vocab, _BLOCK))](
        logits,
        counts,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        out,
        logits.stride(0),
        vocab,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return out
