"""The fleets that are compared: adaptive, colocated at several chunk sizes, and every split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

from ..core.config import Admission, Policy
from ..core.cost import StepCost
from ..core.ids import Role
from .costs import EIGHT_B_ON_H200
from .run import Fleet
from .worker_spec import WorkerSpec

CHUNKS = (1024, 512, 2048, 4096)


class Kind(StrEnum):
    """Fleets of one kind race for the best capacity among them. Static ones run as the field runs
    them (everybody is let in, prompts in the order of their coming), and, all of them together,
    with our own admission and demotion."""

    ADAPTIVE = "adaptive"
    UNPLANNED = "unplanned"  # adaptive, and no worker changes its role
    COLOCATED = "colocated"
    SPLIT = "split"
    OURS = "ours"


def fleets_of(
    kind: Kind, gpus: int, spec: WorkerSpec, chunks: Sequence[int] = CHUNKS
) -> list[Fleet]:
    match kind:
        case Kind.ADAPTIVE:
            return [adaptive(gpus, spec)]
        case Kind.UNPLANNED:
            return [adaptive(gpus, spec, planned=False)]
        case Kind.COLOCATED:
            return [colocated(gpus, spec, chunk, Admission.OPEN) for chunk in chunks]
        case Kind.SPLIT:
            return [split(*shares, spec, Admission.OPEN) for shares in splits(gpus)]
        case Kind.OURS:
            mixed = [colocated(gpus, spec, chunk, Admission.SLO) for chunk in chunks]
            return [split(*shares, spec, Admission.SLO) for shares in splits(gpus)] + mixed


def colocated(gpus: int, spec: WorkerSpec, chunk: int, admission: Admission) -> Fleet:
    spec = replace(spec, paced=False, demote=admission is Admission.SLO, chunk_tokens=chunk)
    roles = (Role.MIXED,) * gpus
    return _static(f"colocated, chunk {chunk}", roles, Policy.COLOCATED, admission, spec)


def split(prefill: int, decode: int, spec: WorkerSpec, admission: Admission) -> Fleet:
    spec = replace(spec, paced=False, demote=admission is Admission.SLO)
    roles = (Role.PREFILL,) * prefill + (Role.DECODE,) * decode
    return _static(f"split {prefill}:{decode}", roles, Policy.DISAGGREGATED, admission, spec)


def _static(
    name: str, roles: tuple[Role, ...], policy: Policy, admission: Admission, spec: WorkerSpec
) -> Fleet:
    """Who lets everybody in needs no forecast."""
    forecasts = admission is Admission.SLO
    return Fleet(name, roles, policy, admission, spec, prefix_aware=False, forecasts=forecasts)


def adaptive(gpus: int, spec: WorkerSpec, *, planned: bool = True) -> Fleet:
    """It begins with half of them in each pool; what comes of that the planner says."""
    roles = (Role.PREFILL,) * (gpus // 2) + (Role.DECODE,) * (gpus - gpus // 2)
    return Fleet("adaptive", roles, Policy.ADAPTIVE, Admission.SLO, spec, planned=planned)


def splits(gpus: int) -> list[tuple[int, int]]:
    """Every split of few GPUs, in eighths of many; the even ones first."""
    if gpus <= 8:
        shares = [(n, gpus - n) for n in range(1, gpus)]
    else:
        shares = [(gpus * n // 8, gpus - gpus * n // 8) for n in range(1, 8)]
    return sorted(shares, key=lambda share: abs(share[0] - share[1]))


def eight_b_on_h200(cost: StepCost = EIGHT_B_ON_H200) -> WorkerSpec:
    """880,000 tokens of KV: 110 GiB at 128 KiB a token. Blocks of 64 tokens, for speed."""
    return WorkerSpec(cost, 880_000 // 64, 64)
