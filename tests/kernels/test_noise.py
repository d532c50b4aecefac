"""The noise: exact integers, the right distribution, nothing shared between draws."""

from __future__ import annotations

import math

import pytest
import torch

from pdserve.kernels.noise import gumbel, hash_entries, noise_key

SIZE = 1 << 17
KEYS = [noise_key(seed, 0, 0) for seed in (0, 1, 2**63 - 1)]


def _lowbias32(x: int) -> int:
    """Wellons' function on plain integers, without a key."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_without_a_key_the_hash_is_lowbias32() -> None:
    index = torch.tensor([0, 1, 2, 49151, 2**31 - 1], dtype=torch.int32)
    bits = hash_entries(0, index)
    assert [x % 2**32 for x in bits.tolist()] == [_lowbias32(x) for x in index.tolist()]


def test_each_half_of_the_key_changes_the_bits() -> None:
    index = torch.arange(1000, dtype=torch.int32)
    plain = hash_entries(0, index)
    for key in (1, 1 << 31, 1 << 32, noise_key(0, 0, 0) >> 32 << 32):
        changed = (plain ^ hash_entries(key, index)).tolist()
        flipped = sum((x % 2**32).bit_count() for x in changed) / 1000
        assert 14 < flipped < 18  # of 32


def test_a_key_depends_on_all_of_seed_choice_and_position() -> None:
    around = [noise_key(seed, choice, at) for seed in (7, 8) for choice in (0, 1) for at in (0, 1)]
    assert len(set(around)) == 8
    assert all(0 <= key < 2**64 for key in around)


@pytest.mark.parametrize("key", KEYS)
def test_the_noise_has_the_gumbel_distribution(key: int) -> None:
    noise = gumbel(key, torch.arange(SIZE, dtype=torch.int32)).double()
    assert bool(noise.isfinite().all())
    assert abs(float(noise.mean()) - 0.5772) < 0.015
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.05
    # Kolmogorov and Smirnov: the largest distance of the two distribution functions.
    expected = torch.exp(-torch.exp(-noise.sort().values))
    actual = (torch.arange(SIZE) + 0.5) / SIZE
    assert float((expected - actual).abs().max()) < 1.95 / math.sqrt(SIZE)


def test_the_tail_is_as_long_as_32_bits_allow() -> None:
    """Uniforms of 24 bits would have ties among the largest of 2^22 entries."""
    index = torch.arange(1 << 22, dtype=torch.int32)
    noise = gumbel(KEYS[0], index)
    largest = noise.topk(64).values
    assert largest.unique().numel() == 64
    assert 12 < float(largest[0]) < 22.2


def test_draws_share_nothing() -> None:
    index = torch.arange(SIZE, dtype=torch.int32)
    a = gumbel(noise_key(3, 0, 10), index)
    for other in (noise_key(3, 0, 11), noise_key(3, 1, 10), noise_key(4, 0, 10)):
        pair = torch.stack((a, gumbel(other, index)))
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / math.sqrt(SIZE)
