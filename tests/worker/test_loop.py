"""What the step thread says of when a step ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from pdserve.core.plan import Engine, StepPlan, StepResult
from pdserve.worker.io import IoThread
from pdserve.worker.loop import StepLoop


@dataclass
class Step:
    world: World
    due: float

    @property
    def done(self) -> bool:
        return self.due <= self.world.now

    def wait(self) -> StepResult:
        self.world.now = max(self.world.now, self.due)
        return StepResult(())


@dataclass
class World:
    """A device with a host: each step's launch takes the host so long, and the device so long."""

    steps: list[tuple[float, float]]
    now: float = 0.0
    free: float = 0.0  # the device is, from then on
    told: list[tuple[float, float | None]] = field(default_factory=list)
    drained: bool = False
    hung_after_s: float = 5.0
    stopped: None = None
    limits: Any = field(default_factory=lambda: SimpleNamespace(max_inflight=2))

    def launch(self, plan: StepPlan) -> Step:
        host, device = self.steps.pop(0)
        begins = max(self.now, self.free)
        self.now += host
        self.free = max(begins + device, self.now)
        return Step(self, self.free)

    # the core's

    def plan(self, now: float) -> tuple[StepPlan | None, list[Any]]:
        return (StepPlan((), ()) if self.steps else None), []

    def complete(self, result: StepResult, now: float, since: float | None) -> list[Any]:
        self.told.append((now, since))
        self.drained = len(self.told) == 3
        return []

    # the desk's

    @property
    def core(self) -> World:
        return self

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None: ...
    def catch_up(self, post: object) -> None: ...
    def close(self) -> None: ...


def test_a_step_that_was_done_before_anybody_looked_is_told_as_that() -> None:
    world = World([(0.25, 4.0), (10.0, 40.0), (0.25, 4.0)])
    io = SimpleNamespace(
        desk=world,
        post=lambda effects: None,
        step_begins=lambda limit_s: None,
        step_ended=lambda idle: None,
    )
    StepLoop(cast(Engine, world), cast(IoThread, io), lambda: world.now).run()
    # the first was over at 4, while the second was launched until 10.25; the others were awaited
    assert world.told == [(10.25, 0.25), (44.0, None), (48.0, None)]
