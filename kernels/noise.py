"""Counter-based noise: the same bits on any device, for any batch, in any order.

The Gumbel noise of vocabulary entry ``i`` is a hash of (seed, choice, position, i), so a
seeded request draws the same tokens wherever and however often it is run. Counter-based
random numbers: Salmon et al., 2011. The key is mixed with SplitMix64 (Steele, Lea and Flood,
2014); an entry with Wellons' ``lowbias32``, half of the key going in before the first and
half before the second multiplication. The integers are exact everywhere; the two logarithms
that follow may differ by a rounding between devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
SPLIT_MIX_1 = 0xBF58476D1CE4E5B9
SPLIT_MIX_2 = 0x94D049BB133111EB
LOW_BIAS_1 = 0x7FEB352D
LOW_BIAS_2 = 0x846CA68B
LARGEST_UNIFORM = 1 - 2.0**-24
_MASK_64 = 2**64 - 1


def noise_key(seed: int, choice: int, position: int) -> int:
    """The 64-bit key of one draw."""
    return _split_mix(_split_mix(_split_mix(seed) ^ choice) ^ position)


def _split_mix(x: int) -> int:
    x = (x + GOLDEN) & _MASK_64
    x = (x ^ (x >> 30)) * SPLIT_MIX_1 & _MASK_64
    x = (x ^ (x >> 27)) * SPLIT_MIX_2 & _MASK_64
    return x ^ (x >> 31)


def hash_entries(key: int, index: Tensor) -> Tensor:
    """32 random bits for each vocabulary entry ``index[N]`` int32 -> ``[N]`` int32."""
    # int32 arithmetic wraps; an arithmetic shift is made a logical one by a mask.
    h = index ^ signed_32(key)
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h *= LOW_BIAS_1
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h ^= signed_32(key >> 32)
    h *= signed_32(LOW_BIAS_2)
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h


def signed_32(x: int) -> int:
    """The low 32 bits of ``x`` as a signed number."""
    return ((x + 2**31) & 0xFFFFFFFF) - 2**31


def gumbel(key: int, index: Tensor) -> Tensor:
    """Standard Gumbel noise for the entries ``index[N]`` int32 -> ``[N]`` fp32.

    It is ``-log(-log(1 - u))``. Large noise comes from small ``u``, which keeps all its bits:
    ``u`` is the hash without its sign over 2^31, bounded away from 0 and 1.
    """
    u = hash_entries(key, index).to(torch.float32).abs_().mul_(2.0**-31)
    u.clamp_(2.0**-32, LARGEST_UNIFORM)
    return u.neg_().log1p_().neg_().log_().neg_()
