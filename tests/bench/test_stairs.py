"""Staircases: which levels come next, what capacity they come to, and what a run of them keeps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pdserve.bench.slo import report
from pdserve.bench.slo.folder import Folder
from pdserve.bench.slo.known_server import KnownServer
from pdserve.bench.slo.load import LevelCount, Levels
from pdserve.bench.slo.measures import Objectives
from pdserve.bench.slo.records import ClientHealth, Record
from pdserve.bench.slo.runs import LoadSpec, Run, climb
from pdserve.bench.slo.servers import Server
from pdserve.bench.slo.stairs import Step, between, following, steps
from pdserve.bench.slo.verdict import read_peer

LEVELS = (4.0, 6.0, 8.0, 10.0)
PEER = Path(__file__).parents[2] / "docs" / "results" / "peer-8b.json"


@pytest.mark.parametrize(
    ("points", "guess", "expected"),
    [
        ({}, None, LEVELS),
        ({}, 7.0, (6.0, 8.0, 10.0)),
        ({}, 3.0, LEVELS),  # lower than all levels: no guess at all
        ({4.0: 1.0, 6.0: 0.95}, None, (8.0, 10.0)),
        ({8.0: 0.8}, None, (6.0,)),  # down, one at a time
        ({8.0: 0.5}, None, (4.0,)),  # or two, from far above
        ({8.0: 0.5, 4.0: 0.95}, None, (6.0,)),
        ({8.0: 0.5, 6.0: 0.5}, None, (4.0,)),
        ({8.0: 0.5, 6.0: 0.95}, None, ()),
        ({10.0: 0.5, 6.0: 0.95}, None, (8.0,)),
        ({4.0: 0.5}, None, ()),  # not met
        ({10.0: 0.95}, None, ()),  # more than these levels can tell
        ({4.0: 0.95, 6.0: 0.5, 8.0: 0.95}, None, ()),  # above a miss nothing counts
    ],
)
def test_the_next_levels(
    points: dict[float, float], guess: float | None, expected: tuple[float, ...]
) -> None:
    assert following(points, LEVELS, 0.9, guess) == expected


def test_capacity_lies_where_the_line_passes_the_target() -> None:
    assert between({4.0: 1.0, 16.0: 0.8}, 0.9) == pytest.approx(8.0)
    assert between({4.0: 0.9, 16.0: 0.5}, 0.9) == pytest.approx(4.0)
    assert between({4.0: 1.0}, 0.9) == 4.0
    assert between({4.0: 0.5}, 0.9) is None


def test_a_level_lasts_until_enough_requests_are_to_be_expected() -> None:
    assert steps((2.0, 50.0), 10.0, 3.0, 40) == (
        Step(2.0, 0.0, 3.0, 23.0),
        Step(50.0, 23.0, 26.0, 33.0),
    )


def test_a_staircase_ends_once_a_missed_level_is_through() -> None:
    levels = Levels(Objectives(1, 1), ((0.0, 10.0), (13.0, 20.0)), (2, 1))
    assert [levels.of(due) for due in (0.0, 9.9, 11.0, 13.0, 20.0)] == [0, 0, None, 1, None]
    fine = LevelCount(missed=2)
    assert not levels.missed((fine, LevelCount(missed=9)), 15.0)  # the second is still on
    assert not levels.missed((fine, LevelCount(missed=9, open=1)), 21.0)
    assert levels.missed((fine, LevelCount(missed=9)), 21.0)
    assert levels.missed((LevelCount(missed=3), LevelCount()), 11.0)
    assert not levels.missed((), 30.0)  # no client has reported


def test_a_run_of_a_staircase_keeps_each_level_up_to_the_first_that_was_missed() -> None:
    stairs = steps((10.0, 20.0, 40.0), 0.8, 0.2, 1)
    load = LoadSpec("8/4", rate=10.0, warmup_s=0.2, duration_s=0.8, seed=2, clients=2)

    async def runs(objectives: Objectives) -> list[Run]:
        async with KnownServer(0.01, 0.002).serving() as url:
            server = Server("known", url, "known", 1, 0, ours=False)
            return await asyncio.to_thread(
                climb, server, load, stairs, objectives=objectives, target=0.9
            )

    every = asyncio.run(runs(Objectives(30_000, 30_000)))
    assert [run.load.rate for run in every] == [10.0, 20.0, 40.0]
    assert [run.window for run in every] == [step.window for step in stairs]
    for run, step in zip(every, stairs, strict=True):
        assert run.counted() and all(record.failure is None for record in run.records)
        assert all(r.due < step.end and r.ended >= step.start for r in run.records)
    (missed,) = asyncio.run(runs(Objectives(1, 1)))  # ms: the server takes 10
    assert [r.due for r in missed.counted()] == [r.due for r in every[0].counted()]


def made(server: str, workload: str, rate: float, late: int, *, told: bool = False) -> Run:
    """100 requests, of which ``late`` take a second."""
    records = tuple(
        Record(i, i / 10, i / 10, ((i / 10 + (1.0 if i < late else 0.1), 1),), 20.0, 8, 1)
        for i in range(100)
    )
    return Run(
        server=Server(server, "http://x", "m", 2, 0, ours=True),
        load=LoadSpec(workload, rate=rate, duration_s=10.0, warmup_s=0.0, stairs=LEVELS),
        window=(0.0, 10.0),
        records=records,
        health=ClientHealth(),
        gave_up=None,
        created=rate,
        told=Objectives(200, 10) if told else None,
    )


def test_the_report_sets_answers_beside_each_other_and_beside_a_peer(tmp_path: Path) -> None:
    folder = Folder.make(tmp_path)
    for run in (
        made("colocated", "2048/256", 4.0, 0),
        made("colocated", "2048/256", 8.0, 20),
        made("adaptive", "2048/256", 8.0, 5, told=True),
        made("adaptive", "2048/256", 10.0, 15, told=True),
    ):
        folder.keep(run)
    folder.agree_on(
        {
            "slos": ["200/10", "500/30"],
            "staircase": {"target": 0.9, "min_requests": 1},
            "levels": {"2048/256": list(LEVELS)},
        }
    )
    found = report.write(folder, read_peer(PEER))
    ratio, looser = found["ratios"]
    assert ratio["better"] == "colocated"
    assert ratio["best"] == pytest.approx(32**0.5 / 2)
    assert ratio["ratio"] == pytest.approx(80**0.5 / 32**0.5)
    assert not ratio["exact"]  # 6.0 was not tried, between 4 and 8
    # Nobody was told of 500/30. Who met 200/10 meets that too; how much more is not known.
    assert (looser["adaptive"], looser["exact"]) == (4.0, False)
    text = (tmp_path / "report.md").read_text()
    assert "| 2048/256 | 200/10 | adaptive | 8: 95% (89 to 98) | 10: 85% (77 to 91) |" in text
    assert "| 2048/256 | 200/10 | 5.9 | 7.08 | 2.83 (0.40) | 4.47 (0.63) |" in text
