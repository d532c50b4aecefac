"""Requests of random lengths through the schedulers and a real engine with too little memory."""

from __future__ import annotations

from pathlib import Path
from random import Random

import tiny_models
from load import random_requests, run_load
from tiny_models import Answers
from transformers import LlamaConfig


def test_survivors_get_their_tokens(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=tiny_models.VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=7,
    )
    tiny_models.save(config, tmp_path)
    engine = tiny_models.engine_of(tmp_path, memory="110KiB", max_slots=8, max_step_tokens=128)
    rng = Random(3)
    requests = random_requests(rng, 60, longest=200, vocab=tiny_models.VOCAB)
    assert run_load(engine, requests, rng, at_once=12) > 0, "nothing was preempted"
    reference = Answers(tmp_path)
    survivors = [asked for asked in requests if not asked.aborted]
    assert 30 < len(survivors) < 60
    for asked in survivors:
        assert len(asked.drawn) == asked.num_output
        assert reference.largest_gap(asked.prompt, asked.drawn) < 1e-3
