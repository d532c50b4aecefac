"""``pdserve bench engine``: the engine alone, with no scheduler, router or socket before it.

--config FILE    a deployment's model on this machine's CPU, against transformers
--shape NAME     a known shape with random weights on a GPU, against what the hardware allows
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..engine.presets import PRESETS


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.shape is not None:
        from . import engine_floors

        return engine_floors.main(arguments)
    from . import engine_peer

    return engine_peer.main(arguments)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="pdserve bench engine", description=__doc__)
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="a deployment, YAML")
    what.add_argument("--shape", choices=list(PRESETS), help="a known shape")
    made.add_argument("--out", type=Path, help="write the report there as well, JSON")
    peer = made.add_argument_group("with --config")
    peer.add_argument("--streams", type=int, default=8)
    peer.add_argument("--input", type=int, default=64)
    peer.add_argument("--output", type=int, default=64)
    peer.add_argument("--turns", type=int, default=5)
    peer.add_argument("--threads", type=int, help="default: the cores this process may use")
    floors = made.add_argument_group("with --shape")
    floors.add_argument("--load", choices=["dummy"], default="dummy", help="random weights")
    floors.add_argument("--device", default="cuda", help="default: the first GPU")
    floors.add_argument("--rounds", type=int, default=9, help="pairs of case and floor (9)")
    floors.add_argument("--only", nargs="+", metavar="CASE", help="cases whose name holds a word")
    floors.add_argument("--profile", action="store_true", help="kernels with their share")
    return made
