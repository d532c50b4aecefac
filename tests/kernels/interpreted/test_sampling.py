"""The Triton sampler draws what the reference draws."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from sampling_cases import Params, row_params, token_history

from pdserve.kernels import noise
from pdserve.kernels.gpu import sampling as gpu_sampling
from pdserve.kernels.sampling import LogitBias, penalize, sample_reference

ROWS = [
    Params(),
    Params(temperature=0),
    Params(temperature=0.7, top_k=5),
    Params(top_p=0.9),
    Params(temperature=1.3, min_p=0.1),
    Params(top_k=40, top_p=0.5, repetition=1.3),
    Params(top_k=1, presence=0.5),
    Params(top_k=10**6, top_p=0.999, frequency=0.2),
]


@triton.jit
def _noise_kernel(key_ptr, bits_ptr, noise_ptr, SIZE: tl.constexpr):
    key = gpu_sampling.noise_key(tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 2))
    at = tl.arange(0, SIZE)
    tl.store(bits_ptr + at, gpu_sampling.hash_entries(key, at))
    tl.store(noise_ptr + at, gpu_sampling.gumbel(key, at))


@pytest.mark.parametrize("key", [(0, 0, 0), (2**63 - 1, 5, 1000), (1234567890123, 65535, 2**31)])
def test_the_bits_are_the_references(key: tuple[int, int, int]) -> None:
    size = 1 << 15
    bits, drawn = torch.empty(size, dtype=torch.int32), torch.empty(size)
    _noise_kernel[(1,)](torch.tensor(key), bits, drawn, size)
    index = torch.arange(size, dtype=torch.int32)
    assert torch.equal(bits, noise.hash_entries(noise.noise_key(*key), index))
    expected = noise.gumbel(noise.noise_key(*key), index)
    assert torch.allclose(drawn, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("vocab", "spread", "dtype"),
    [(50, 0.5, torch.float16), (5000, 4.0, torch.float32), (5000, 0.5, torch.float16)],
)
def test_draws_are_the_references(vocab: int, spread: float, dtype: torch.dtype) -> None:
    """In fp16 with many ties."""
    logits = (torch.randn(len(ROWS), vocab) * spread).to(dtype)
    prompts = [torch.randint(0, vocab, (row * 3,)).tolist() for row in range(len(ROWS))]
    outputs = [torch.randint(0, vocab, (20,)).tolist() for _ in ROWS]
    history = token_history(prompts, outputs)
    bias = LogitBias(
        torch.tensor([0, 0, 3, 4]),
        torch.tensor([7, 7, 9, int(logits[4].argmax())]),
        torch.tensor([5.0, 1.0, -math.inf, -math.inf]),
    )
    params = row_params(ROWS, seed=11, first_position=100)
    for given in ((None, None), (history, bias)):
        expected = sample_reference(logits, params, *given)
        assert torch.equal(gpu_sampling.sample(logits, params, *given), expected)


@pytest.mark.parametrize("vocab", [50, 5000])
def test_penalised_logits_are_the_references(vocab: int) -> None:
    params = row_params([Params(repetition=1.4, presence=0.5, frequency=0.25), Params()] * 2)
    prompts = [torch.randint(0, vocab, (size,)).tolist() for size in (0, 30, 7, 1100)]
    outputs = [torch.randint(0, vocab, (size,)).tolist() for size in (20, 5, 0, 1200)]
    history = token_history(prompts, outputs)
    logits = torch.randn(4, vocab)
    expected = logits.clone()
    penalize(expected, params, history)
    assert not torch.equal(expected[0], logits[0])
    assert torch.allclose(gpu_sampling.penalize(logits, params, history), expected, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_a_nucleus_of_equals_is_kept_whole(top_p: float) -> None:
    logits = torch.full((1, 300), -1.0)
    logits[0, 100:200] = 2.0
    drawn = [
        gpu_sampling.sample(
            logits, row_params([Params(top_p=top_p)], first_position=at), None, None
        ).item()
        for at in range(12)
    ]
    assert all(100 <= token < 200 for token in drawn)
    assert len(set(drawn)) > 6
