"""What a simulated GPU's steps cost: an 8B Llama shape on an H200, or a file of step times."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..core.cost import (
    DecodeCost,
    DecodePoint,
    PrefillCost,
    PrefillPoint,
    StepCost,
    fit_decode,
    fit_prefill,
)
from ..core.errors import ConfigError

# The fit of docs/results/h200-8b-steps.json; a test holds the two together. ``beside_ms`` is what
# 28 steps of 8 to 128 sequences with chunks of 64 to 2,048 tokens took beyond it on average.
EIGHT_B_ON_H200 = StepCost(
    PrefillCost(base_ms=2.044, per_token_ms=0.0219885, per_pair_ms=7.92821e-7),
    DecodeCost(base_ms=4.56074, per_sequence_ms=0.006954, per_kv_token_ms=3.34986e-5),
    beside_ms=0.9,
)
_DECODE = re.compile(r"decode b(\d+) ctx(\d+)")
_PREFILL = re.compile(r"prefill (\d+)x(\d+)")


def read_steps(path: Path) -> StepCost:
    """From a JSON file whose ``milliseconds`` name steps: ``decode b64 ctx1024`` (sequences, tokens
    of each), ``prefill 16x512`` (prompts, tokens of each)."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["milliseconds"]
        decodes: list[DecodePoint] = []
        prefills: list[PrefillPoint] = []
        for name, ms in named.items():
            if found := _DECODE.fullmatch(name):
                batch, context = map(int, found.groups())
                decodes.append(DecodePoint(batch, batch * context, float(ms)))
            elif found := _PREFILL.fullmatch(name):
                prompts, tokens = map(int, found.groups())
                prefills.append(PrefillPoint(((tokens, 0),) * prompts, float(ms)))
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a file of step times: {error}") from error
    if (
        not decodes
        or not prefills
        or min(min(d.ms for d in decodes), min(p.ms for p in prefills)) <= 0
    ):
        raise ConfigError(f"{path}: needs times, above 0, of both decode and prefill steps")
    return StepCost(fit_prefill(prefills), fit_decode(decodes))
