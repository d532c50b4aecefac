"""Counter-based noise: the same bits on any device, for any batch, in any order.

The Gumbel noise of vocabulary entry ``i`` is a hash of (seed, choice, position, i), so a
seeded request draws the same tokens wherever and however often it is run. Counter-based
random numbers: Salmon et al., 2011; the mixing functions are SplitMix64 (Steele, Lea and
Flood, 2014) for the key and Wellons' ``lowbias32`` for the entries, applied twice with
half of the key each. The integers are exact everywhere; the two logarithms that follow may
differ by a rounding between devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B - 2**32  # as a signed 32-bit number
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_SPLIT_1 = 0xBF58476D1CE4E5B9 - 2**64
_SPLIT_2 = 0x94D049BB133111EB - 2**64
SERIES_BELOW = 2.0**-5


def noise_keys(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """One 64-bit key a row from ``seed, choice, position[B]`` (int64) -> ``[B]`` int64."""
    key = _split_mix(seed)
    key = _split_mix(key ^ choice)
    return _split_mix(key ^ position)


def _split_mix(x: Tensor) -> Tensor:
    """SplitMix64's step; int64 arithmetic wraps, and shifts are made logical by a mask."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _SPLIT_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _SPLIT_2
    return x ^ ((x >> 31) & (2**33 - 1))


def hash_entries(keys: Tensor, index: Tensor) -> Tensor:
    """32 random bits for each (key, vocabulary entry).

    ``keys[B, 1]`` int64, ``index[1, N]`` or ``[B, N]`` int32 -> ``[B, N]`` int32.
    """
    low = (keys << 32 >> 32).to(torch.int32)  # sign-extended, so that the cast is exact
    high = (keys >> 32).to(torch.int32)
    h = _low_bias(index ^ low)
    return _low_bias(h.bitwise_xor_(high))


def _low_bias(x: Tensor) -> Tensor:
    """Wellons' lowbias32 in place on ``x`` (int32, wrapping)."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= MIX_1
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= MIX_2
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def exponential(bits: Tensor) -> Tensor:
    """Standard exponential variates from ``bits`` (int32): ``-log(1 - u)``, fine near u = 0.

    Small values decide who wins a race among many, so ``u`` keeps all 32 bits there.
    """
    u = bits.to(torch.float32).mul_(2.0**-32)  # in [-0.5, 0.5]
    u = torch.where(u < 0, u + 1, u).clamp_(2.0**-33, 1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return torch.where(u < SERIES_BELOW, series, -torch.log(1 - u))


def gumbel(keys: Tensor, index: Tensor) -> Tensor:
    """Standard Gumbel noise fp32 for ``keys[B, 1]`` and ``index[1 or B, N]`` -> ``[B, N]``."""
    return exponential(hash_entries(keys, index)).log_().neg_()
