"""``pdserve simulate``: a deployment under a load, in virtual time, policy by policy."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

from ..core.config import Admission, Deployment, Policy
from ..core.errors import ConfigError
from ..core.ids import Role
from ..router.policy import can_split
from .capacity import find
from .costs import EIGHT_B_ON_H200, read_steps
from .report import report, table
from .run import Fleet, simulate
from .worker_spec import WorkerSpec
from .workload import Arrival, Length, arrivals, poisson, read_trace, rescaled, synthetic

_LENGTHS = re.compile(r"(\d+)/(\d+)")


def main(deployment: Deployment, options: argparse.Namespace) -> int:
    if options.rate <= 0 or options.requests < 10:
        raise ConfigError("--rate must be more than 0, and --requests at least 10")
    lengths, own_times = _lengths(options)
    named = deployment.kv.prefix_cache and any(row.hash_ids for row in lengths)
    fleets = _fleets(deployment, options, named)
    room = fleets[0].spec.num_blocks * deployment.kv.block_size
    largest = max(row.prompt + row.output for row in lengths)
    if largest > room:
        raise ConfigError(f"--kv-tokens {room}: there is a request of {largest} tokens")
    slo, count, block_size = deployment.slo, options.requests, deployment.kv.block_size

    def at(rate: float) -> list[Arrival]:
        if own_times:
            timed = rescaled(lengths, rate, count)
        else:
            timed = poisson(lengths, rate, count, options.seed)
        return arrivals(timed, slo.ttft_ms, slo.tpot_ms, block_size if named else 0)

    load = at(options.rate)
    reports = []
    for fleet in fleets:
        outcome = simulate(fleet, load, options.seed)
        capacity = None
        if options.capacity:
            least = options.rate / 256
            capacity = find(fleet, at, options.rate, least=least, seed=options.seed).rate
        reports.append(report(fleet.name, outcome, capacity))
    if options.json:
        print(json.dumps([asdict(one) for one in reports], indent=1))
    else:
        print(table(reports))
    return 0


def _fleets(deployment: Deployment, options: argparse.Namespace, prefix_cache: bool) -> list[Fleet]:
    """The file's workers under the adaptive policy, and under the static ones beside it."""
    pools, kv = deployment.pools, deployment.kv
    cost = EIGHT_B_ON_H200 if options.steps is None else read_steps(options.steps)
    batch, chunk = pools.decode.max_batch, pools.prefill.chunk_tokens
    spec = WorkerSpec(
        cost,
        max(1, options.kv_tokens // kv.block_size),
        kv.block_size,
        max_batch=256 if batch == "auto" else batch,
        chunk_tokens=2048 if chunk == "auto" else chunk,
        prefix_cache=prefix_cache,  # of texts whose beginnings have no names it would find anything
        slowdown=options.slowdown,
        jitter=options.jitter,
    )
    roles = (
        (Role.PREFILL,) * pools.prefill.workers
        + (Role.DECODE,) * pools.decode.workers
        + (Role.MIXED,) * pools.mixed.workers
    )
    if not roles:
        raise ConfigError("pools: a simulation needs the workers in the file")
    admission = deployment.router.admission
    static = replace(spec, paced=False, demote=admission is Admission.SLO)
    mixed = (Role.MIXED,) * len(roles)
    planned = deployment.router.plan_roles
    fleets = [Fleet("adaptive", roles, Policy.ADAPTIVE, admission, spec, planned=planned)]
    fleets.append(Fleet("colocated", mixed, Policy.COLOCATED, admission, static, False))
    if can_split(pools):
        split = Fleet("disaggregated", roles, Policy.DISAGGREGATED, admission, static, False)
        fleets.append(split)
    return fleets


def _lengths(options: argparse.Namespace) -> tuple[list[Length], bool]:
    """With whether they come at times of their own."""
    found = _LENGTHS.fullmatch(options.trace)
    if found is None:
        return read_trace(Path(options.trace)), not options.poisson
    prompt, output = map(int, found.groups())
    if not prompt or not output:
        raise ConfigError(f"--trace {options.trace}: lengths are at least 1")
    return synthetic(prompt, output, options.requests, options.seed), False
