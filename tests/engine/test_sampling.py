"""Drawing through the engine, against transformers' processors and direct arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import Answers, random_prompt
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pdserve.bench.driver import StepDriver
from pdserve.core.params import SamplingParams
from pdserve.core.plan import NewSequence, Row, SampledToken, StepPlan
from pdserve.engine.engine import TorchEngine

PROMPT = random_prompt(24, seed=30)


@pytest.fixture(scope="module")
def engine(llama_folder: Path) -> TorchEngine:
    return tiny_models.engine_of(llama_folder)


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "temperature": 0.0, **fields})


def ids(tokens: Sequence[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


def run(engine: TorchEngine, *wanted: SamplingParams) -> list[list[int]]:
    found = StepDriver(engine).run([PROMPT] * len(wanted), wanted, chunk_tokens=9)
    return [ids(tokens) for tokens in found]


class OutputPenalties(LogitsProcessor):
    """OpenAI's: over the output alone."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        output = input_ids[0, len(PROMPT) :]
        counts = torch.bincount(output, minlength=scores.shape[1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


def expected(answers: Answers, *processors: LogitsProcessor) -> list[int]:
    out = answers.model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=0,
        logits_processor=LogitsProcessorList(processors),
    )
    return [int(token) for token in out[0, len(PROMPT) :]]


def test_penalties_equal_transformers(engine: TorchEngine, answers: Answers) -> None:
    cases = {
        params(): [],
        params(repetition_penalty=1.4): [RepetitionPenaltyLogitsProcessor(1.4)],
        params(repetition_penalty=0.7): [RepetitionPenaltyLogitsProcessor(0.7)],
        params(presence_penalty=1.5): [OutputPenalties(1.5, 0)],
        params(frequency_penalty=0.8): [OutputPenalties(0, 0.8)],
        params(repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=-0.4): [
            RepetitionPenaltyLogitsProcessor(1.1),
            OutputPenalties(0.3, -0.4),
        ],
    }
    found = run(engine, *cases)
    wanted = [expected(answers, *processors) for processors in cases.values()]
    assert found == wanted
    assert len({tuple(answer) for answer in found}) == len(found), "each one has an effect"


@pytest.mark.parametrize(
    ("fields", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.4, "top_k": 40, "top_p": 0.9},
            [TemperatureLogitsWarper(1.4), TopKLogitsWarper(40), TopPLogitsWarper(0.9)],
        ),
    ],
)
def test_draws_have_the_distribution_of_transformers(
    fields: dict[str, Any], warpers: list[LogitsProcessor], engine: TorchEngine, answers: Answers
) -> None:
    scores = answers.logits(PROMPT)[-1:].clone()
    for warper in warpers:
        scores = warper(torch.tensor([PROMPT]), scores)
    probabilities = scores.softmax(-1)[0]

    rounds, slots = 250, engine.limits.max_slots
    counts = torch.zeros(tiny_models.VOCAB)
    for turn in range(rounds):
        seeds = range(turn * slots, (turn + 1) * slots)
        wanted = [params(max_tokens=1, seed=s, **{"temperature": 1.0, **fields}) for s in seeds]
        for (token,) in StepDriver(engine).run([PROMPT] * slots, wanted):
            counts[token.token_id] += 1
    assert not counts[probabilities == 0].any(), "a token that was cut off is drawn"
    seen = probabilities * rounds * slots > 5
    expectation = probabilities[seen] * rounds * slots
    chi_squared = ((counts[seen] - expectation) ** 2 / expectation).sum().item()
    degrees = int(seen.sum())
    assert chi_squared < degrees + 5 * (2 * degrees) ** 0.5


def test_a_seed_draws_the_same_alone_and_in_company(engine: TorchEngine) -> None:
    wanted = params(temperature=1.0, seed=2**62 + 17)
    (alone,) = run(engine, wanted)
    company = [params(temperature=2.0, seed=n, top_p=0.5) for n in range(5)]
    assert run(engine, *company[:3], wanted, *company[3:])[3] == alone
    (other,) = run(engine, params(temperature=1.0, seed=5))
    (choice,) = run(engine, params(temperature=1.0, seed=2**62 + 17, choice=1))
    assert other != alone != choice


def test_a_replay_draws_on_with_the_same_tokens(engine: TorchEngine) -> None:
    wanted = params(temperature=1.0, seed=3, frequency_penalty=0.5, min_tokens=15)
    (whole,) = run(engine, wanted)
    for known in (1, 7, 19):
        tokens = (*PROMPT, *whole[:known])
        sequence = NewSequence(2, tokens, len(PROMPT), wanted, (0, 1, 2))
        result = engine.launch(StepPlan((sequence,), (Row(2, 0, len(tokens)),))).wait()
        assert ids(result.tokens) == [whole[known]]


def test_ends_are_forbidden_before_min_tokens(engine: TorchEngine, answers: Answers) -> None:
    assert engine.limits.eos_token_ids == (7,)
    (plain,) = run(engine, params())
    stop = plain[4]
    assert stop not in plain[:4]
    (early,) = run(engine, params(stop_token_ids=(stop,), min_tokens=4))
    assert early == plain, "forbidden only up to the fourth token"
    (late,) = run(engine, params(stop_token_ids=(stop,), min_tokens=5))
    assert late[:4] == plain[:4] and late[4] != stop
    scores = answers.logits([*PROMPT, *plain[:4]])[-1].clone()
    scores[[stop, 7]] = -torch.inf
    assert late[4] == int(scores.argmax())


def test_logit_bias(engine: TorchEngine) -> None:
    (plain,) = run(engine, params())
    biased = params(logit_bias=((99, 100.0), (plain[0], -100.0), (10**6, 5.0)))
    both = run(engine, biased, params())
    assert both == [[99] * 20, plain]


def test_log_probabilities_are_of_the_raw_logits(engine: TorchEngine, answers: Answers) -> None:
    wanted = [
        params(max_tokens=5, logprobs=3, temperature=1.0, seed=4, top_k=5, presence_penalty=1.0),
        params(max_tokens=5),
        params(max_tokens=5, logprobs=0),
        params(max_tokens=5, logprobs=20, logit_bias=((3, 100.0),)),
    ]
    runs = StepDriver(engine).run([PROMPT] * 4, wanted)
    assert all(token.logprob is None and token.top == () for token in runs[1])
    for which, number in ((0, 3), (2, 0), (3, 20)):
        exact = answers.logits([*PROMPT, *ids(runs[which])]).log_softmax(-1)
        for index, token in enumerate(runs[which]):
            scores = exact[len(PROMPT) + index - 1]
            assert token.logprob == pytest.approx(float(scores[token.token_id]), abs=1e-4)
            assert len(token.top) == number
            best = scores.topk(number) if number else None
            if best is not None:
                assert [at for at, _ in token.top] == best.indices.tolist()
                assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
