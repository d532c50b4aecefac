"""Sequences for tests of the rooms that handle them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from pdserve.cache.sequence import Sequence
from pdserve.core.messages import Key
from pdserve.core.params import SamplingParams

_arrivals = itertools.count()


def key(number: int, attempt: int = 0) -> Key:
    """The key of the ``number``-th request."""
    return Key(f"{number:032x}", attempt)


def sequence(
    prompt: Iterable[int] | int,
    output: Iterable[int] = (),
    *,
    number: int | None = None,
    max_tokens: int = 100,
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
) -> Sequence:
    """A sequence that arrives after all before it. ``prompt``: ids, or how many of them."""
    arrival = next(_arrivals)
    tokens = [arrival * 1000 + i for i in range(prompt)] if isinstance(prompt, int) else [*prompt]
    params = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos
    )
    request = key(arrival if number is None else number)
    return Sequence(request, params, arrival, len(tokens), [*tokens, *output])


def compute(seq: Sequence) -> None:
    """As if a step had computed all its tokens."""
    seq.num_scheduled_tokens = seq.num_computed_tokens = seq.num_tokens
