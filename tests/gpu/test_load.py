"""A mixed load on a GPU: a few hundred requests, hang-ups, preemptions, steps in flight."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_models
import torch
from load import random_requests, run_load
from tiny_models import Answers
from transformers import LlamaConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

SIZES: dict[str, Any] = {
    "vocab_size": tiny_models.VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": 7,
}
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
        logits = reference.logits([*asked.prompt, *asked.drawn])[len(asked.prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(asked.drawn)[:, None])[:, 0]
        gaps = (logits.max(-1).values - chosen) / logits.std(-1)
        assert float(gaps.max()) < GAPS[dtype]
