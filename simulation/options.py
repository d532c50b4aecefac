"""The options of ``pdserve simulate``: apart from the command, for every command lists them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trace", required=True, metavar="T", help="a trace file, or lengths such as 2048/256")
    add("--rate", required=True, type=float, metavar="R", help="requests a second")
    add("--requests", type=int, default=3000, metavar="N", help="default 3000")
    add("--seed", type=int, default=1, metavar="N", help="of lengths, times and jitter; default 1")
    add(
        "--poisson",
        action="store_true",
        help="a Poisson process with the trace's lengths, not the trace's own times",
    )
    add("--steps", type=Path, metavar="JSON", help="step times; default: 8B on an H200")
    add("--kv-tokens", type=int, default=880_000, metavar="N", help="of a worker; default 880000")
    add("--slowdown", type=float, default=1.0, metavar="F", help="steps take F times their cost")
    add("--jitter", type=float, default=0.0, metavar="F", help="relative deviation of a step")
    add("--capacity", action="store_true", help="look for the rate that 90%% of requests survive")
    add("--json", action="store_true", help="the figures, for programs")
