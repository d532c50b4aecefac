"""A worker core before a real engine, loaded at random: arrivals, hang-ups, too little memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from pdserve.core.ids import Role, Task, WorkerRef
from pdserve.core.messages import Abort, Key, Place, TokenBatch
from pdserve.core.params import SamplingParams
from pdserve.core.plan import Engine, StepHandle
from pdserve.kvtransfer.handshake import Handshake
from pdserve.kvtransfer.receiver import Receiver
from pdserve.kvtransfer.sender import Sender
from pdserve.kvtransfer.settings import TransferSettings
from pdserve.worker.budget import Budget
from pdserve.worker.core import WorkerCore
from pdserve.worker.effects import Effect, Tell


@dataclass(slots=True)
class Asked:
    prompt: tuple[int, ...]
    num_output: int
    aborted: bool = False
    drawn: list[int] = field(default_factory=list)


def random_requests(rng: Random, count: int, *, longest: int, vocab: int) -> list[Asked]:
    """Half of them short; prompts and answers fit ``longest`` together."""
    made = []
    for _ in range(count):
        length = rng.randint(1, rng.choice((20, longest // 2)))
        prompt = tuple(rng.randrange(vocab) for _ in range(length))
        made.append(Asked(prompt, rng.randint(1, longest // 2)))
    return made


def run_load(engine: Engine, requests: Sequence[Asked], rng: Random, *, at_once: int) -> int:
    """Runs all of them; every fourth is aborted somewhere on its way. Returns the preemptions.

    Ends with the pool's accounts checked and nothing held.
    """
    layout, limits = engine.kv.layout, engine.limits
    settings = TransferSettings(layout.block_size, layout.block_bytes)
    handshake = Handshake(WorkerRef("w", 1), "token", "a model", layout)
    budget = Budget(70, max_batch=limits.max_slots - 2, prompt_slots=2, growth_tokens=0)
    core = WorkerCore(
        Role.MIXED,
        dict.fromkeys(Role, budget),
        limits,
        layout,
        Sender(settings, handshake, engine.kv.generations),
        Receiver(settings),
        salt=b"a deployment",
    )
    by_id = {f"r{index}": asked for index, asked in enumerate(requests)}
    waiting, live = deque(by_id), set[str]()
    doomed = {name: rng.randrange(20) for name in by_id if rng.random() < 0.25}
    steps: deque[StepHandle] = deque()
    preempted = 0

    def take(effects: Sequence[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, Tell), effect
            if isinstance(effect.message, TokenBatch):
                for item in effect.message.items:
                    asked = by_id[item.key.request_id]
                    if item.index == len(asked.drawn):  # a replay repeats
                        asked.drawn.append(item.token_id)
                    if item.finish is not None:
                        live.discard(item.key.request_id)

    while waiting or live or steps:
        while waiting and len(live) < at_once and rng.random() < 0.7:
            name = waiting.popleft()
            asked = by_id[name]
            params = SamplingParams(max_tokens=asked.num_output, temperature=0.0, ignore_eos=True)
            live.add(name)
            take(
                core.router_message(Place(Key(name, 1), Task.WHOLE, asked.prompt, (), params), 0.0)
            )
        for name in [name for name in live if name in doomed]:
            doomed[name] -= 1
            if doomed[name] < 0:
                live.discard(name)
                by_id[name].aborted = True
                take(core.router_message(Abort(Key(name, 1)), 0.0))
        plan, effects = core.plan(0.0)
        take(effects)
        if plan is not None:
            # A sequence that is filled in anew with some of its answer was preempted.
            preempted += sum(len(new.token_ids) > new.num_prompt_tokens for new in plan.new)
            steps.append(engine.launch(plan))
        if steps and (plan is None or len(steps) >= limits.max_inflight):
            take(core.complete(steps.popleft().wait(), 0.0))
        core.check()
    assert core.blocks.held == 0, core.blocks
    return preempted
