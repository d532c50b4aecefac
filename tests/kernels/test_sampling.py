"""The sampler against sorting in plain Python, and what it promises beside."""

from __future__ import annotations

import math

import pytest
import torch
from sampling_cases import Params, distribution, penalized, row_params, token_history

from pdserve.kernels.sampling import LogitBias, cut, log_probs, sample

DRAWS = 3000
SHAPED = [
    Params(),
    Params(temperature=0.5),
    Params(temperature=2.0),
    Params(top_k=1),
    Params(top_k=4),
    Params(top_p=0.6),
    Params(min_p=0.2),
    Params(top_k=6, top_p=0.7),
    Params(temperature=1.5, top_k=9, top_p=0.95, min_p=0.1),
]


@pytest.mark.parametrize("params", SHAPED, ids=str)
def test_draws_follow_the_distribution(params: Params) -> None:
    logits = torch.randn(12) * 2
    logits[3] = logits[7]  # a tie
    drawn = sample(logits.expand(DRAWS, -1), row_params([params] * DRAWS, seed=5))
    exact = torch.tensor(distribution(logits.tolist(), params))
    counts = drawn.bincount(minlength=12)
    assert not counts[exact == 0].any()
    # Four standard deviations of a binomial count, of each token.
    allowed = 4 * (DRAWS * exact * (1 - exact)).sqrt() + 1e-3
    assert bool(((counts - DRAWS * exact).abs() <= allowed).all())


@pytest.mark.parametrize("spread", [8.0, 1.0, 0.01, 0.0])  # a few candidates, many, all, all equal
@pytest.mark.parametrize(
    "params", [Params(top_p=0.9), Params(top_k=50, top_p=0.5), Params(top_k=700), Params(min_p=0.5)]
)
def test_a_cut_keeps_what_sorting_keeps(params: Params, spread: float) -> None:
    logits = (torch.randn(6000) * spread * 16).round() / 16  # many ties
    values, ids = cut(logits, params.top_k, params.top_p, params.min_p)
    exact = torch.tensor(distribution(logits.tolist(), params), dtype=torch.float64)
    assert torch.equal(values, logits[ids.long()])
    assert torch.equal(ids.long().sort().values, exact.nonzero().flatten())


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(3, 1000, dtype=torch.bfloat16)
    logits[0, [500, 700]] = 1
    logits[1, [999, 20]] = 2
    assert sample(logits, None).tolist() == [500, 20, 0]
    assert sample(logits, row_params([Params(temperature=0)] * 3)).tolist() == [500, 20, 0]


def test_greedy_rows_may_stand_beside_others() -> None:
    logits = torch.randn(3, 100)
    drawn = sample(logits, row_params([Params(temperature=0), Params(), Params(temperature=0)]))
    assert drawn[[0, 2]].tolist() == logits[[0, 2]].argmax(dim=1).tolist()


def test_a_draw_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(len(SHAPED), 5000)
    together = sample(logits, row_params(SHAPED, seed=9))
    for row, params in enumerate(SHAPED):
        alone = row_params([params], seed=9, first_position=row)
        assert sample(logits[row : row + 1], alone).item() == together[row].item()


def test_seed_choice_and_position_each_draw_anew() -> None:
    logits = torch.zeros(64, 5000)
    rows = [Params()] * 64
    draws = [
        sample(logits, row_params(rows, seed=1)),
        sample(logits, row_params(rows, seed=2)),
        sample(logits, row_params(rows, seed=1, choice=1)),
        sample(logits, row_params(rows, seed=1, first_position=64)),
    ]
    assert len(torch.cat(draws).unique()) > 240  # of 256; hardly one twice
    assert torch.equal(draws[0], sample(logits, row_params(rows, seed=1)))


PENALIZED = [
    Params(0, repetition=1.3),
    Params(0, repetition=0.7, presence=0.4),
    Params(0, frequency=0.6),
    Params(0, presence=-1.0, frequency=0.2, repetition=1.1),
    Params(0),
]


def test_penalties_count_prompt_and_output() -> None:
    vocab = 40
    logits = torch.randn(5, vocab)
    prompts = [[1, 2, 2, 3], [], [39, 0], [5] * 7, [1]]
    outputs = [[4, 4, 4, 1], [7, 8], [0, 39, 39, 39], [], [1, 1]]
    history = token_history(prompts, outputs)
    raw = logits.clone()
    drawn = sample(logits, row_params(PENALIZED), history)
    for row, params in enumerate(PENALIZED):
        exact = penalized(logits[row].tolist(), params, prompts[row], outputs[row])
        assert drawn[row].item() == max(range(vocab), key=exact.__getitem__)
    assert torch.equal(logits, raw)


@pytest.mark.parametrize("params", PENALIZED, ids=str)
def test_each_penalised_logit(params: Params) -> None:
    """One token at a time is raised until it is the best: where that happens shows its value."""
    logits = torch.linspace(-3, 3, 12)
    prompt, output = [0, 11, 4, 4], [4, 5, 5, 10]
    exact = torch.tensor(penalized(logits.tolist(), params, prompt, output), dtype=torch.float64)
    gap = exact.max() - exact
    for sign, wins in ((1e-3, True), (-1e-3, False)):
        every = torch.arange(12)
        bias = LogitBias(every, every, (gap + sign).float())
        rows = row_params([params] * 12)
        history = token_history([prompt] * 12, [output] * 12)
        drawn = sample(logits.expand(12, -1), rows, history, bias)
        best = int(exact.argmax())
        expected = every if wins else torch.full((12,), best)
        others = every != best
        assert torch.equal(drawn[others], expected[others])


def test_a_bias_adds_and_forbids() -> None:
    logits = torch.zeros(3, 50)
    bias = LogitBias(
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([7, 7, 0, 1]),
        torch.tensor([1.0, 2.0, -math.inf, -math.inf]),
    )
    assert sample(logits, None, None, bias).tolist() == [7, 2, 0]
    greedy = row_params([Params(temperature=0)] * 3)
    assert sample(logits, greedy, None, bias).tolist() == [7, 2, 0]
    for position in range(40):
        rows = row_params([Params(top_p=0.9)] * 3, first_position=position)
        assert sample(logits, rows, None, bias)[1].item() not in (0, 1)
    assert not logits.any()


def test_log_probs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(3, 200)
    token_ids = torch.tensor([5, 199, 0])
    exact = logits.double().log_softmax(dim=-1)
    chosen, top_ids, top = log_probs(logits, token_ids, 4)
    assert torch.allclose(chosen.double(), exact[range(3), token_ids], atol=1e-6)
    assert torch.equal(top_ids, exact.sort(dim=-1, descending=True).indices[:, :4])
    assert torch.allclose(top.double(), exact.gather(1, top_ids), atol=1e-6)
    assert log_probs(logits, token_ids, 0)[1].shape == (3, 0)
