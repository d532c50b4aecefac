"""A mixed load on a GPU: a few hundred requests, hang-ups, preemptions, steps in flight."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import tiny_models
import torch
from load import random_requests, run_load
from tiny_models import SIZES, Answers
from transformers import LlamaConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

# How far a token's logit may lie under the reference's best, in standard deviations.
GAPS = {"fp32": 0.02, "bf16": 0.5}


@pytest.mark.parametrize("dtype", GAPS)
def test_survivors_get_their_tokens(dtype: str, tmp_path: Path) -> None:
    tiny_models.save(LlamaConfig(**SIZES), tmp_path)
    itemsize = 4 if dtype == "fp32" else 2
    block = 3 * 2 * 2 * 16 * 32 * itemsize
    engine = tiny_models.engine_of(
        tmp_path,
        device="cuda:0",
        dtype=dtype,
        memory=f"{80 * block / 1024 + 1}KiB",
        max_slots=16,
        max_step_tokens=128,
    )
    rng = Random(4)
    requests = random_requests(rng, 300, longest=400, vocab=tiny_models.VOCAB)
    assert run_load(engine, requests, rng, at_once=24) > 0, "nothing was preempted"
    reference = Answers(tmp_path)
    survivors = [asked for asked in requests if not asked.aborted]
    assert 150 < len(survivors) < 300
    for asked in survivors:
        assert len(asked.drawn) == asked.num_output
        assert reference.largest_gap(asked.prompt, asked.drawn) < GAPS[dtype]
