"""Sampling by the book, in float64 with plain Python: sort, add up, cut."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pdserve.kernels.sampling import RowParams, TokenHistory


@dataclass(frozen=True, slots=True)
class Params:
    """Of one row; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0


def row_params(
    rows: Sequence[Params], *, seed: int = 0, choice: int = 0, first_position: int = 0
) -> RowParams:
    """All rows with one seed, at one position after the other."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=torch.float32)

    return RowParams(
        column("temperature"),
        torch.tensor([row.top_k for row in rows], dtype=torch.int32),
        column("top_p"),
        column("min_p"),
        column("repetition"),
        column("presence"),
        column("frequency"),
        torch.full((len(rows),), seed, dtype=torch.int64),
        torch.full((len(rows),), choice, dtype=torch.int64),
        torch.arange(first_position, first_position + len(rows)),
    )


def token_history(
    prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
) -> TokenHistory:
    """Rows in slots from the last one down; past a row's end the buffer holds tokens too."""
    size = len(prompts)
    longest = max(len(p) + len(o) for p, o in zip(prompts, outputs, strict=True))
    token_ids = torch.randint(0, 5, (size + 1, longest + 3), dtype=torch.int32)
    slots = torch.arange(size, 0, -1)
    for slot, prompt, output in zip(slots.tolist(), prompts, outputs, strict=True):
        both = torch.tensor([*prompt, *output], dtype=torch.int32)
        token_ids[slot, : len(both)] = both
    prompt_lens = torch.tensor([len(p) for p in prompts], dtype=torch.int32)
    output_lens = torch.tensor([len(o) for o in outputs], dtype=torch.int32)
    return TokenHistory(token_ids, slots, prompt_lens, prompt_lens + output_lens)


def penalized(
    logits: Sequence[float], params: Params, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    used = Counter(output)
    result = list(logits)
    for token in {*prompt, *output}:
        value = result[token]
        result[token] = value / params.repetition if value > 0 else value * params.repetition
    for token, count in used.items():
        result[token] -= params.frequency * count + params.presence
    return result


def distribution(logits: Sequence[float], params: Params) -> list[float]:
    """The probability of each token: top-k, then top-p of what is left, then min-p."""
    scaled = [value / params.temperature for value in logits]
    peak = max(scaled)
    mass = {token: math.exp(value - peak) for token, value in enumerate(scaled)}
    if params.top_k:
        least = sorted(scaled, reverse=True)[min(params.top_k, len(scaled)) - 1]
        mass = {token: part for token, part in mass.items() if scaled[token] >= least}
    if params.top_p < 1:
        total, above, kept = sum(mass.values()), 0.0, dict[int, float]()
        for value in sorted({scaled[token] for token in mass}, reverse=True):
            if above >= params.top_p * total:
                break
            ties = {token: part for token, part in mass.items() if scaled[token] == value}
            kept |= ties
            above += sum(ties.values())
        mass = kept
    mass = {token: part for token, part in mass.items() if part >= params.min_p}
    total = sum(mass.values())
    return [mass.get(token, 0.0) / total for token in range(len(scaled))]
