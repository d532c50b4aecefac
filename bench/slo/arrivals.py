"""When requests arrive in an open loop: seconds since the start, drawn ahead and by seed.

An open loop does not wait for answers. Its times depend on nothing that the server does, so
that a server which falls behind is met by all that arrives in the meantime.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...core.errors import ConfigError


def constant(rate: float, duration_s: float) -> list[float]:
    return [index / rate for index in range(int(rate * duration_s))]


def gamma(rate: float, duration_s: float, burstiness: float, seed: int) -> list[float]:
    """Gaps from a gamma distribution of shape ``burstiness``: 1 is Poisson, less is burstier;
    the squared coefficient of variation of a gap is ``1 / burstiness``."""
    if burstiness <= 0:
        raise ConfigError(f"--burstiness: found {burstiness}; allowed: a number above 0")
    draw = np.random.default_rng([seed, 1])
    times: list[float] = []
    now = 0.0
    while True:
        now += float(draw.gamma(burstiness, 1.0 / (rate * burstiness)))
        if now >= duration_s:
            return times
        times.append(now)


def poisson(rate: float, duration_s: float, seed: int) -> list[float]:
    return gamma(rate, duration_s, 1.0, seed)


def replayed(times: Sequence[float], duration_s: float, *, scale: float) -> list[float]:
    """A trace's own times, ``scale`` times as fast."""
    if scale <= 0:
        raise ConfigError(f"--time-scale: found {scale}; allowed: a number above 0")
    scaled = [time / scale for time in times]
    return [time for time in scaled if time < duration_s]


def scale_for(times: Sequence[float], rate: float) -> float:
    """The time scale at which a trace arrives at this mean rate (1/s)."""
    span = times[-1] - times[0]
    if span <= 0:
        raise ConfigError("the trace has no times to scale; use --arrivals poisson")
    return rate * span / (len(times) - 1)
