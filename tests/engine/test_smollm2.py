"""SmolLM2 itself: real weights, real text, the tokens of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
from texts import prose
from tiny_models import Answers
from transformers import AutoTokenizer

from pdserve.bench.driver import StepDriver
from pdserve.core.config import ModelSection
from pdserve.core.params import SamplingParams
from pdserve.engine.engine import TorchEngine
from pdserve.engine.prepare import prepare

GREEDY = SamplingParams(max_tokens=10, temperature=0.0)
LENGTHS = (1, 17, 64, 333, 1500)


@pytest.fixture(scope="module")
def folder() -> Path:
    card = prepare(ModelSection.model_validate({"path": "smollm2"}))
    assert (card.eos_token_ids, card.max_context) == ((2,), 8192)
    return Path(card.folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[TorchEngine]:
    engine = tiny_models.engine_of(folder, memory="512MiB", max_context=2048)
    yield engine
    engine.close()


def test_prompts_of_any_length(folder: Path, engine: TorchEngine) -> None:
    reference, tokenizer = Answers(folder), AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(prose(n + 9, seed=n))["input_ids"][:n] for n in LENGTHS]
    found = StepDriver(engine).run(prompts, [GREEDY] * len(prompts), chunk_tokens=400)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert [token.token_id for token in tokens] == reference.greedy(prompt, 10), len(prompt)


def test_it_knows_where_paris_is(folder: Path, engine: TorchEngine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    (tokens,) = StepDriver(engine).run([prompt], [GREEDY])
    text = tokenizer.decode([token.token_id for token in tokens])
    assert text.startswith("The capital of France is Paris.")
    assert tokens[-1].token_id != tokenizer.eos_token_id == 2 or "<|im_end|>" in text
