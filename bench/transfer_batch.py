"""What arriving prompts cost a batch that decodes: real engines, random weights.

``N`` sequences decode on D, alone and beside prompts in turns: P reads one after the other, and
D takes each, draws its second token and is done with it. The batch's contexts grow all the
while, so what a turn with prompts took is compared with the mean of the turns around it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core import config
from ..core.config import Deployment
from ..core.ids import Role
from ..engine.prepare import prepare
from .transfer_pair import Pair, Request, specs_of
from .transfer_worker import WorkerSpec

_CONTEXT = 1024  # tokens that each sequence of the batch begins with
_PROMPT = 2048
_TURNS = 5  # with prompts


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    first, second = arguments.devices.split(",")
    num_tokens = max(arguments.tokens or [_PROMPT])
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as name:
        folder = Path(name)
        deployment = Deployment.model_validate(
            {
                "model": {"path": arguments.model, "load": "dummy"},
                "kv": {"prefix_cache": False, "memory": arguments.memory},
                "kv_transfer": {"medium": arguments.media or "auto"},
            }
        )
        config.save(deployment, folder / "deployment.json")
        prepare(deployment.model).save(folder / "card.json")
        template = WorkerSpec(
            worker_id="",
            role=Role.PREFILL,
            join=f"ipc://{folder}/control.sock",
            device="",
            deployment=str(folder / "deployment.json"),
            card=str(folder / "card.json"),
            layout=None,
            chunk_tokens=0,
            token_us=0.0,
        )
        with Pair(folder, specs_of(template, (str(first), str(second)))) as pair:
            return _measure(pair, arguments.batch, num_tokens, arguments.seconds)


def _measure(pair: Pair, num_sequences: int, num_tokens: int, seconds: float) -> dict[str, Any]:
    done = pair.transfer(num_tokens).done  # compiles, connects, maps
    assert done is not None
    context = min(_CONTEXT, num_tokens)
    batch = [pair.begin(context, max_tokens=1 << 14, whole=True) for _ in range(num_sequences)]
    pair.until(lambda: all(len(request.times) > 8 for request in batch))
    begun = [0]
    current: list[Request] = []

    def next_prompt() -> None:
        if not current or (current[0].finished and current[0].done is not None):
            current[:] = [pair.begin(num_tokens)]
            begun[0] += 1

    turn = seconds / _TURNS
    alone, beside = [_steps(pair, batch, turn)], []
    for _ in range(_TURNS):
        beside.append(_steps(pair, batch, turn, next_prompt))
        pair.until(lambda: current[0].finished)
        alone.append(_steps(pair, batch, turn))
    growth = growths(alone, beside)
    for request in batch:
        pair.end(request)
    report = {
        "medium": done.medium.value,
        "batch": num_sequences,
        "prompt_tokens": num_tokens,
        "prompts": begun[0],
        "prompts_s": begun[0] / seconds,
        "tpot_alone_ms": statistics.mean(alone) * 1000,
        "tpot_beside_ms": statistics.mean(beside) * 1000,
        "growth": statistics.median(growth),
        "growths": growth,
    }
    print(
        f"batch of {num_sequences}: {report['tpot_alone_ms']:.3f} ms a token alone, "
        f"{report['tpot_beside_ms']:.3f} beside {begun[0]} prompts of {num_tokens} tokens by "
        f"{done.medium}: {100 * statistics.median(growth):+.1f}%",
        flush=True,
    )
    return report


def growths(alone: Sequence[float], beside: Sequence[float]) -> list[float]:
    """Of each turn with prompts against the mean of the turns before and after it."""
    return [
        with_prompts / ((before + after) / 2) - 1
        for with_prompts, before, after in zip(beside, alone[:-1], alone[1:], strict=True)
    ]


def _steps(pair: Pair, batch: list[Request], seconds: float, between: Any = None) -> float:
    """The mean time between two tokens of a sequence, over all of them."""
    marks = [len(request.times) for request in batch]
    pair.listen(seconds, between)
    enough = [(request, mark + 2) for request, mark in zip(batch, marks, strict=True)]
    pair.until(lambda: all(one.finished or len(one.times) >= count for one, count in enough))
    spans = []
    for request, mark in zip(batch, marks, strict=True):
        times = request.times[mark:]
        if request.finished:
            raise RuntimeError("the batch has ended early: ask for fewer --seconds")
        spans.append((times[-1] - times[0]) / (len(times) - 1))
    return statistics.mean(spans)
