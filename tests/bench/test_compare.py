"""Comparisons and their reports, on servers of known latencies: what is kept, resumed and drawn."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.bench.slo import commands, report
from pdserve.bench.slo.clients import run_clients
from pdserve.bench.slo.compare import Entry, turned, warming
from pdserve.bench.slo.folder import Folder
from pdserve.bench.slo.greedy import Difference, differences
from pdserve.bench.slo.known_server import KnownServer
from pdserve.bench.slo.load import GiveUp, Orders
from pdserve.bench.slo.measures import Objectives
from pdserve.bench.slo.records import Cause, ClientHealth, Record
from pdserve.bench.slo.runs import LoadSpec, Run
from pdserve.bench.slo.servers import Server
from pdserve.bench.slo.stream import Target
from pdserve.bench.slo.workloads import Ask, Session
from pdserve.core.errors import ConfigError


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A known server in a thread of its own."""
    loop = asyncio.new_event_loop()
    up: list[str] = []
    ready = threading.Event()
    stop = asyncio.Event()

    async def serve() -> None:
        async with KnownServer(0.01, 0.002).serving() as where:
            up.append(where)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    yield up[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


OPTIONS = ["--duration", "1.2", "--warmup", "0.2", "--slo", "5000/500", "--seed", "3"]


def test_a_run_is_kept_whole(url: str, tmp_path: Path) -> None:
    out = tmp_path / "results"
    options = ["--workload", "8/4", "--rate", "20", "--clients", "2", "--out", str(out), *OPTIONS]
    code = commands.main("serve", [url, *options])
    (run,) = Folder.existing(out).runs()
    assert code == (0 if run.fault is None else 1)
    assert len(run.counted()) >= 8 and all(r.failure is None for r in run.records)
    assert [r.index for r in run.records] == list(range(len(run.records)))
    (cell,) = json.loads((out / "report.json").read_bytes())["cells"]
    assert cell["runs"][0]["summary"]["num_requests"] == len(run.counted())


def test_clients_give_up_by_what_they_missed_together(url: str) -> None:
    sessions = tuple((i, Session(i * 0.02, (Ask((1, 2), 3),))) for i in range(1000))
    give_up = GiveUp(Objectives(1, 1), allowed=15)  # ms: the server takes 10
    orders = Orders(Target(url, "known"), sessions, (0.0, 20.0), give_up=give_up)
    outcome = run_clients(orders, 2, lambda progress: None, limit_s=60.0)
    assert outcome.gave_up and 15 < len(outcome.records) < 900


def test_an_outcome_may_be_larger_than_the_pipe_to_its_parent(url: str) -> None:
    sessions = tuple((i, Session(0.0, (Ask((1, 2), 600),))) for i in range(100))
    orders = Orders(Target(url, "known"), sessions, (0.0, 1.0))
    outcome = run_clients(orders, 1, lambda progress: time.sleep(0.05), limit_s=60.0)
    assert [record.num_output for record in outcome.records] == [600] * 100


def test_a_report_holds_definitions_and_pictures(tmp_path: Path) -> None:
    runs = [made(name, rate, 0.01 * rate) for name in "ab" for rate in (2.0, 4.0)]
    folder_of(tmp_path, *runs)
    assert commands.main("report", [str(tmp_path)]) == 0
    found = json.loads((tmp_path / "report.json").read_bytes())
    assert found["schema"] == "pdserve.bench.report/1"
    assert {d["name"] for d in found["definitions"]} >= {"TTFT", "TPOT", "goodput"}
    pictures = ["attainment", "slo-scale", "distributions", "pareto"]
    for name in pictures:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "(t_n - t_1) / (n - 1)" in page


def test_a_comparison_stops_at_its_budget_and_goes_on(url: str, tmp_path: Path) -> None:
    out = tmp_path / "results"
    names = [f"one={url}", f"other={url}"]
    workloads = ["--workload", "8/4@10,20"]
    none = ["--budget", "0.5"]  # seconds: less than any run
    arguments = [*names, *workloads, *OPTIONS, "--out", str(out)]
    assert commands.main("compare", [*arguments, *none]) == 3
    assert Folder.existing(out).runs() == []
    assert commands.main("compare", ["--resume", str(out)]) == 0
    valid = [run for run in Folder.existing(out).runs() if run.fault is None]
    done = {(run.server.name, run.load.rate) for run in valid}
    assert done <= {(name, rate) for name in ("one", "other") for rate in (10.0, 20.0)}
    text = (out / "report.md").read_text()
    assert all(f"| {n} | 8/4 | {r}/s |" in text for n in ("one", "other") for r in (10, 20))
    with pytest.raises(ConfigError, match="with other loads"):
        commands.main("compare", [*arguments, "--seed", "4"])


def made(
    server: str, rate: float, ttft_s: float, *, told: Objectives | None = None, gpus: int = 2
) -> Run:
    records = tuple(
        Record(i, i / rate, i / rate, ((i / rate + ttft_s, 1),), i / rate + ttft_s, 8, 1)
        for i in range(int(10 * rate))
    )
    return Run(
        server=Server(server, "http://x", "m", gpus, 0, ours=told is not None),
        load=LoadSpec("8/1", rate=rate, duration_s=10.0, warmup_s=0.0),
        window=(0.0, 10.0),
        records=records,
        health=ClientHealth(),
        gave_up=None,
        created=rate,
        told=told,
    )


LOOSE, TIGHT = Objectives(500, 30), Objectives(100, 30)


def folder_of(tmp_path: Path, *runs: Run) -> Folder:
    folder = Folder.make(tmp_path)
    search = {"target": 0.9, "tolerance": 0.5, "lowest": 1.0, "highest": 100.0}
    folder.agree_on({"slos": [str(LOOSE), str(TIGHT)], "search": search, "starts": {"8/1": 4.0}})
    for run in runs:
        folder.keep(run)
    return folder


def test_capacities_stand_side_by_side_for_each_gpu(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        made("a", 1.0, 0.3),
        made("a", 4.0, 0.3),
        made("a", 6.0, 0.9),
        made("b", 4.0, 0.05, gpus=1),
        made("b", 6.0, 0.9, gpus=1),
    )
    text = report.markdown(report.build(folder))
    assert "| 8/1 | 500/30 | 2 | 4 |" in text  # 4/s on two GPUs, 4/s on one
    assert "| 8/1 | 100/30 | not met | 4 |" in text
    # Of the fastest run of each: 0.9 s are met at twice 500 ms, and at no scale of 100.
    assert "### a, 8/1, 6/s" in text
    assert "| 500/30 | 0% | 0% | 0% | 0% | 0% | 0% | 100% | 100% | 100% |" in text
    assert "| TTFT | 60 | 900 | 900 [900, 900] | 900 [900, 900] |" in text


def test_a_run_told_of_one_pair_says_nothing_of_another(tmp_path: Path) -> None:
    run = made("a", 4.0, 0.05, told=TIGHT)
    assert run.attained(TIGHT) == 1.0 and run.attained(LOOSE) is None
    folder_of(tmp_path, run)
    (kept,) = Folder.existing(tmp_path).runs()
    assert kept == run


def test_a_run_that_was_given_up_speaks_for_the_tighter_only() -> None:
    run = made("a", 4.0, 0.9)
    given_up = Run(**{f: getattr(run, f) for f in run.__slots__} | {"gave_up": LOOSE})
    assert given_up.attained(LOOSE) == given_up.attained(TIGHT) == 0.0
    assert given_up.attained(Objectives(900, 30)) is None


def test_an_invalid_run_counts_nowhere(tmp_path: Path) -> None:
    run = made("a", 4.0, 0.05)
    lagged = Run(
        **{f: getattr(run, f) for f in run.__slots__} | {"health": ClientHealth({"p99": 50.0})}
    )
    folder = folder_of(tmp_path, lagged)
    text = report.markdown(report.build(folder))
    assert "INVALID: the client sent late" in text
    assert "| 8/1 | 500/30 | ? |" in text


def test_failures_are_listed_by_cause(tmp_path: Path) -> None:
    run = made("a", 4.0, 0.05)
    broken = [Record(99, 1.0, 1.0, (), 1.5, 8, 0, failure=Cause.REFUSED)] * 2
    worse = Run(
        **{f: getattr(run, f) for f in run.__slots__} | {"records": (*run.records, *broken)}
    )
    assert "| 2 refused |" in report.markdown(report.build(folder_of(tmp_path, worse)))


def test_where_answers_part() -> None:
    same = [["a", "b"], ["c"]]
    assert differences({"x": same, "y": same}) == []
    assert differences({"x": same, "y": [["a", "b"], ["d"]], "z": [["a"], ["c"]]}) == [
        Difference("x", "y", 1, 0),
        Difference("x", "z", 0, 1),
    ]


def test_orders_turn() -> None:
    entries = [Entry(name, name) for name in "abc"]
    orders = ["".join(entry.name for entry in turned(entries, number)) for number in range(3)]
    assert orders == ["abc", "acb", "cab"]


def test_names_of_servers() -> None:
    assert Entry.parse("configs/a-b.yaml") == Entry("a-b", "configs/a-b.yaml")
    assert Entry.parse("x=http://h:1") == Entry("x", "http://h:1")
    assert Entry.parse("http://h:1/") == Entry("http://h:1", "http://h:1/")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no results"):
        commands.main("report", [str(tmp_path)])
    with pytest.raises(ConfigError, match="not a folder of"):
        Folder.make(tmp_path)
        commands.main("compare", ["--resume", str(tmp_path)])


SIMULATED = """
model: {path: tiny, load: dummy}
engine: simulated
pools:
  prefill: {workers: 1, device: cpu}
  decode: {workers: 1, device: cpu}
router: {policy: disaggregated}
"""


def test_deployments_are_brought_up_agree_and_tell_their_stages(tmp_path: Path) -> None:
    file = tmp_path / "simulated.yaml"
    file.write_text(SIMULATED)
    out = tmp_path / "results"
    # Rates in a list are run and not searched: no attainment is asked of a busy machine.
    load = ["--workload", "20/4@8,16", "--vocab", "256", "--duration", "1.2", "--warmup", "0.2"]
    names = [f"a={file}", f"b={file}"]
    assert commands.main("compare", [*names, *load, "--out", str(out)]) == 0
    folder = Folder.existing(out)
    runs = folder.runs()
    assert [(run.server.name, run.load.rate) for run in runs] == [
        (name, rate) for name in "ab" for rate in (8.0, 16.0)
    ]
    assert all(run.server.ours and run.server.num_gpus == 2 for run in runs)
    answers = folder.answers()
    assert list(answers) == ["a", "b"] and differences(answers) == []
    assert all(len(tokens) == 32 for tokens in answers["a"])
    assert "Greedy answers agree token for token: a, b." in (out / "report.md").read_text()
    for run in runs:
        for record in run.records:
            assert record.failure is None and record.server is not None, record
        assert {"prefill", "hand_over", "network"} <= report.stage_medians(run).keys()


@pytest.mark.parametrize("rate", [0.05, 0.25, 1.0, 3.0, 12.0])
def test_a_warm_up_has_a_request_at_any_rate(rate: float) -> None:
    load = warming(LoadSpec("64/24", duration_s=12.0, warmup_s=3.0), rate)
    assert len(load.sessions(0)) == max(1, round(rate * 5))
    assert load.warmup_s == 0.0
