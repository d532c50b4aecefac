"""``python -P -m pdserve.bench.kernels``: every kernel checked and timed on this GPU.

First the checks against float64, then times beside their floors, in the order of what matters
most; when ``--budget`` seconds are gone, what is left is listed as skipped. Prints the best
variant of each case, writes all of them with ``--out``, and ends with 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .attention_timings import Decode, Prefill
from .kernel_checks import Check, all_checks, poisoned_memory
from .linear_timings import Linear
from .small_timings import Elementwise, Sampling
from .timing import Job, Timing, copy_bandwidth

GROUPS = ("checks", "decode", "prefill", "linear", "elementwise", "sampling")


@dataclass(slots=True)
class Report:
    device: str
    torch: str
    triton: str
    copy_tb_s: float = 0.0
    checks: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    share: tuple[int, int] = (0, 1)

    def attempt(self, name: str, run: Callable[[], object]) -> None:
        """Runs it; an error is written down, and the next thing goes on."""
        try:
            run()
        except Exception as error:  # noqa: BLE001  what a kernel throws is the finding
            text = "".join(traceback.format_exception(error))[-1500:]
            self.errors.append({"name": name, "error": text})
            print(f"FAILED {name}: {str(error)[:300]}", flush=True)

    @property
    def failed(self) -> bool:
        return bool(self.errors) or not all(check["passes"] for check in self.checks)


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device here")
        return 2
    import triton

    deadline = time.monotonic() + arguments.budget
    first, _, every = arguments.share.partition("/")
    report = Report(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    report.share = int(first), int(every)
    for group in arguments.only or GROUPS:
        start = time.monotonic()
        report.attempt(group, partial(_GROUP_RUNS[group], report, deadline))
        report.seconds[group] = round(time.monotonic() - start, 1)
        torch.cuda.empty_cache()
        print(f"{group}: {report.seconds[group]} s", flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(asdict(report), indent=1) + "\n")
    _print(report)
    return 1 if report.failed else 0


def _checks(report: Report, deadline: float) -> None:
    with poisoned_memory():
        for check in all_checks():
            if time.monotonic() > deadline:
                report.skipped.append(check.name)
                continue
            report.attempt(check.name, partial(_check, report, check))


def _check(report: Report, check: Check) -> None:
    error = check.error()
    passes = check.passes(error)
    report.checks.append(
        {"name": check.name, "error": error, "limit": check.limit, "passes": passes}
    )
    if not passes:
        print(f"WRONG {check.name}: {error:.3g} > {check.limit:.3g}", flush=True)


def _jobs(report: Report, deadline: float, jobs: Iterable[Job]) -> None:
    for job in islice(jobs, report.share[0], None, report.share[1]):
        name = f"{job.case} / {job.variant}"
        if time.monotonic() > deadline:
            report.skipped.append(name)
            continue
        report.attempt(name, partial(_time, report, job))


def _time(report: Report, job: Job) -> None:
    report.timings.append(asdict(job.run()))


def _bandwidth(report: Report) -> float:
    if not report.copy_tb_s:
        report.copy_tb_s = copy_bandwidth() / 1e12
    return report.copy_tb_s * 1e12


_GROUP_RUNS: dict[str, Callable[[Report, float], None]] = {
    "checks": _checks,
    "decode": lambda report, deadline: _jobs(report, deadline, Decode().jobs()),
    "prefill": lambda report, deadline: _jobs(report, deadline, Prefill().jobs()),
    "linear": lambda report, deadline: _jobs(report, deadline, Linear(_bandwidth(report)).jobs()),
    "elementwise": lambda report, deadline: _jobs(
        report, deadline, Elementwise(_bandwidth(report)).jobs()
    ),
    "sampling": lambda report, deadline: _jobs(
        report, deadline, Sampling(_bandwidth(report)).jobs()
    ),
}


def _print(report: Report) -> None:
    """The default and the three best variants of each case, floors first."""
    print(f"\n{report.device}, torch {report.torch}, triton {report.triton}")
    cases = dict.fromkeys(timing["case"] for timing in report.timings)
    for case in cases:
        timings = [Timing(**timing) for timing in report.timings if timing["case"] == case]
        floors = [timing for timing in timings if timing.variant.startswith(("floor", "cuDNN"))]
        others = [timing for timing in timings if timing not in floors]
        if not case.startswith("sample"):
            named = [timing for timing in others if "Tuning" not in timing.variant]
            tuned = sorted(set(others) - set(named), key=lambda timing: timing.micros)
            others = named + tuned[:4]
        print(case)
        for timing in sorted(floors, key=lambda timing: timing.micros)[:1] + others:
            ratio = "" if timing.ratio is None else f"{timing.ratio:6.2f}"
            print(
                f"  {timing.micros:9.1f} us {timing.rate:8.2f} {timing.unit:8}{ratio:7}"
                f" {timing.variant}"
            )
    right = sum(check["passes"] for check in report.checks)
    print(
        f"checks: {right} of {len(report.checks)} pass; {len(report.errors)} errors;"
        f" {len(report.skipped)} skipped; copy {report.copy_tb_s:.2f} TB/s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pdserve.bench.kernels", description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write all results as JSON")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="leave the other groups out")
    parser.add_argument(
        "--share",
        default="0/1",
        metavar="I/N",
        help="every Nth timing from I on: N processes side by side fill Triton's cache quickly",
    )
    parser.add_argument("--budget", type=float, default=330, help="seconds (default 330)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
