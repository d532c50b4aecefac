"""Greedy answers equal transformers' token for token, in fp32, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tiny_models import GREEDY, Answers, launch, new, random_prompt
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from pdserve.bench.driver import StepDriver
from pdserve.core.params import SamplingParams
from pdserve.core.plan import NewSequence, Row, StepPlan

LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 40, 64, 100, 129, 200, 256, 400, 700, 1500)

SIZES: dict[str, Any] = {
    "vocab_size": tiny_models.VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, head_dim=8),
    "llama-biased": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "llama-rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-linear": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    ),
    "mistral": MistralConfig(**SIZES, head_dim=10, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-yarn": Qwen2Config(**SIZES, rope_parameters=YARN_ROPE),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    tiny_models.save(FAMILIES[name], tmp_path)
    reference = Answers(tmp_path)
    engine = tiny_models.engine_of(tmp_path)
    room = engine.limits.max_context - GREEDY.max_tokens  # yarn's is what it was stretched to
    assert room >= max(LENGTHS) or name == "qwen2-yarn"
    prompts = [random_prompt(length, seed=1) for length in LENGTHS if length <= room]
    wanted = [reference.greedy(prompt, GREEDY.max_tokens) for prompt in prompts]
    assert len({tuple(answer) for answer in wanted}) > len(wanted) // 2, "they hardly differ"

    blocks = range(engine.kv.layout.num_blocks)[::-3]
    driver = StepDriver(engine, blocks)
    size = engine.limits.max_slots
    together = []
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        together += driver.run(some, [GREEDY] * len(some), chunk_tokens=37)
    for prompt, answer, found in zip(prompts, wanted, together, strict=True):
        assert [token.token_id for token in found] == answer, len(prompt)
    alone = driver.run(prompts[-1:], [GREEDY], chunk_tokens=512)[0]
    assert [token.token_id for token in alone] == wanted[-1]


@pytest.mark.parametrize("block_size", [1, 5, 32])
def test_any_block_size(block_size: int, llama_folder: Path, answers: Answers) -> None:
    engine = tiny_models.engine_of(llama_folder, block_size=block_size)
    prompts = [random_prompt(length, seed=2) for length in (1, 31, 64, 65)]
    found = StepDriver(engine).run(prompts, [GREEDY] * 4, chunk_tokens=30)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert [token.token_id for token in tokens] == answers.greedy(prompt, GREEDY.max_tokens)


def test_a_prefix_in_shared_blocks_is_read_not_computed(
    llama_folder: Path, answers: Answers
) -> None:
    engine = tiny_models.engine_of(llama_folder)
    prefix, tails = random_prompt(48, seed=3), [random_prompt(n, seed=4) for n in (1, 9, 20)]
    shared = (9, 4, 7)  # three whole blocks
    launch(engine, new(0, prefix, shared), Row(0, 0, 48))

    sequences = [
        new(slot, prefix + tail, (*shared, 20 + 2 * slot, 21 + 2 * slot))
        for slot, tail in enumerate(tails)
    ]
    rows = [Row(slot, 48, len(tail)) for slot, tail in enumerate(tails)]
    # Rows of one new token first, as a plan has it.
    firsts = engine.launch(StepPlan(tuple(sequences), tuple(rows))).wait().tokens
    found = {token.slot: [token.token_id] for token in firsts}
    for step in range(5):
        decode = tuple(Row(slot, 48 + len(tail) + step, 1) for slot, tail in enumerate(tails))
        for token in engine.launch(StepPlan((), decode)).wait().tokens:
            found[token.slot].append(token.token_id)
    for slot, tail in enumerate(tails):
        assert found[slot] == answers.greedy(prefix + tail, 6)


def test_blocks_come_step_by_step_and_slots_are_filled_anew(
    llama_folder: Path, answers: Answers
) -> None:
    engine = tiny_models.engine_of(llama_folder, max_slots=2)
    for turn in range(3):
        prompt = random_prompt(30, seed=10 + turn)
        wanted = answers.greedy(prompt, 8)
        launch(engine, new(1, prompt, (40 + turn,)), Row(1, 0, 10, sample=False))
        (token,) = launch(engine, None, Row(1, 10, 20, new_blocks=(3,)))
        found = [token]
        for step in range(7):
            blocks = (50,) if 30 + step == 32 else ()
            found += launch(engine, None, Row(1, 30 + step, 1, new_blocks=blocks))
        assert found == wanted


def test_a_recomputed_sequence_goes_on_with_the_same_tokens(
    llama_folder: Path, answers: Answers
) -> None:
    """Prompt and output so far as one: a preempted or replayed run."""
    engine = tiny_models.engine_of(llama_folder)
    prompt = random_prompt(21, seed=6)
    wanted = answers.greedy(prompt, 10)
    again = NewSequence(3, (*prompt, *wanted[:6]), len(prompt), GREEDY, (5, 6, 8))
    found = launch(engine, again, Row(3, 0, 27))
    for step in range(3):
        found += launch(engine, None, Row(3, 27 + step, 1))
    assert found == wanted[6:]


def test_the_last_position_of_the_context(llama_folder: Path, answers: Answers) -> None:
    engine = tiny_models.engine_of(llama_folder, max_context=64)
    prompt = random_prompt(60, seed=7)
    params = SamplingParams(max_tokens=5, temperature=0.0)
    (found,) = StepDriver(engine).run([prompt], [params])
    assert [token.token_id for token in found] == answers.greedy(prompt, 5)


def test_bf16_weights_on_a_cpu_stay_close(llama_folder: Path, answers: Answers) -> None:
    engine = tiny_models.engine_of(llama_folder, dtype="bf16")
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    prompt = random_prompt(40, seed=8)
    ((token,),) = StepDriver(engine).run([prompt], [params])
    exact = answers.logits(prompt)[-1].log_softmax(-1)
    assert engine.kv.layout.dtype == "fp32"
    differences = [abs(logprob - float(exact[token_id])) for token_id, logprob in token.top]
    assert 1e-5 < max(differences) < 0.1
