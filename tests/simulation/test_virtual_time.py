"""A deployment in virtual time: accounts, determinism, and what a policy must get right."""

from __future__ import annotations

import gzip
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve import cli
from pdserve.core.config import Admission, Policy
from pdserve.core.cost import DecodeCost, PrefillCost, StepCost
from pdserve.core.errors import ConfigError
from pdserve.core.ids import Role
from pdserve.simulation.capacity import best_of, find, ratio_interval
from pdserve.simulation.compare import row_of, searches_of, table
from pdserve.simulation.contest import Cell
from pdserve.simulation.costs import EIGHT_B_ON_H200, read_steps
from pdserve.simulation.fleets import Kind, eight_b_on_h200
from pdserve.simulation.run import Fleet, Outcome, simulate
from pdserve.simulation.search import Search, Setting, look, look_all
from pdserve.simulation.shifting import Shift, line
from pdserve.simulation.shifting import row_of as row_of_shift
from pdserve.simulation.shifting import searches_of as shifts_searches
from pdserve.simulation.worker_spec import WorkerSpec
from pdserve.simulation.workload import (
    Arrival,
    Length,
    arrivals,
    poisson,
    read_trace,
    rescaled,
    shifting,
    synthetic,
)

ROOT = Path(__file__).parents[2]
COST = StepCost(PrefillCost(2.0, 0.02, 0.0), DecodeCost(5.0, 0.01, 1e-5))
SPEC = WorkerSpec(COST, num_blocks=2000, jitter=0.0)
P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def fleet(
    *roles: Role,
    policy: Policy = Policy.ADAPTIVE,
    admission: Admission = Admission.OPEN,
    spec: WorkerSpec = SPEC,
) -> Fleet:
    return Fleet("tested", roles, policy, admission, spec)


def one(prompt: int, output: int, time: float = 0.0, **more: float) -> Arrival:
    return Arrival(time, prompt, output, **more)


def load(rate: float, count: int = 300, prompt: int = 512, output: int = 64) -> list[Arrival]:
    return arrivals(poisson(synthetic(prompt, output, count, 1), rate, count, 1), 500.0, 30.0)


def times(outcome: Outcome) -> list[tuple[float | None, float | None]]:
    return [(one.first, one.last) for one in outcome.served]


def test_one_request_alone_takes_what_its_steps_cost() -> None:
    outcome = simulate(fleet(M, policy=Policy.COLOCATED), [one(1000, 11)])
    (served,) = outcome.served
    assert served.ttft_ms == pytest.approx(COST.prefill.ms(1000))
    steps = [COST.decode.ms(1, 1001 + index) for index in range(10)]
    assert served.tpot_ms == pytest.approx(sum(steps) / 10)


def test_a_prompt_is_cut_into_chunks_and_the_split_adds_a_transfer() -> None:
    spec = replace(SPEC, chunk_tokens=400, paced=False)
    roles = fleet(P, D, policy=Policy.DISAGGREGATED, spec=spec)
    (served,) = simulate(roles, [one(1000, 2)]).served
    chunks = COST.prefill.ms(400) * 2 + COST.prefill.ms(200)
    assert served.ttft_ms == pytest.approx(chunks)
    transfer_ms = (spec.transfer_s + 200 * spec.transfer_s_per_token) * 1e3
    assert served.tpot_ms == pytest.approx(transfer_ms + COST.decode.ms(1, 1001))


def test_a_run_of_steps_is_cut_short_where_somebody_comes() -> None:
    arrivals = [one(100, 200), one(100, 200, time=0.5)]
    both = simulate(fleet(M, policy=Policy.COLOCATED), arrivals).served
    alone = simulate(fleet(M, policy=Policy.COLOCATED), arrivals[:1]).served
    assert both[-1].ttft_ms < 20.0  # it did not wait for the other one's answer
    assert alone[0].last is not None and both[0].last is not None
    assert alone[0].last < both[0].last < alone[0].last * 1.2


@pytest.mark.parametrize("output", [1, 2])
@pytest.mark.parametrize("policy", list(Policy))
def test_short_answers_end(policy: Policy, output: int) -> None:
    outcome = simulate(fleet(P, D, policy=policy), [one(64, output, time=t) for t in (0, 0.01)])
    assert all(served.last is not None for served in outcome.served)


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("num_blocks", [60, 2000])
def test_every_request_ends_and_every_block_comes_back(policy: Policy, num_blocks: int) -> None:
    """With few blocks: sequences are preempted, prompts dropped, and nobody waits for ever."""
    spec = replace(SPEC, num_blocks=num_blocks, jitter=0.2, slowdown=1.1)
    outcome = simulate(fleet(P, D, M, policy=policy, spec=spec), load(40.0, 150, 200, 300))
    assert all(served.last is not None for served in outcome.served)
    for usage in outcome.usage:
        assert usage.prefill_s + usage.decode_s <= outcome.end_s + 1e-9
    if num_blocks == 60:
        assert sum(usage.recomputed for usage in outcome.usage) > 0


def test_the_same_seed_gives_the_same_times() -> None:
    spec = replace(SPEC, jitter=0.2)
    runs = [simulate(fleet(P, D, spec=spec), load(20.0), seed) for seed in (1, 1, 2)]
    assert times(runs[0]) == times(runs[1]) != times(runs[2])


def test_a_hundred_workers_serve() -> None:
    roles = (P,) * 50 + (D,) * 50
    outcome = simulate(fleet(*roles), load(500.0, count=1000))
    assert outcome.attainment == 1.0


def test_what_is_refused_leaves_the_others_in_time() -> None:
    too_much = load(300.0, count=900)
    everybody = simulate(fleet(P, D), too_much)
    chosen = simulate(fleet(P, D, admission=Admission.SLO), too_much)
    assert chosen.attainment > everybody.attainment
    served = [one for one in chosen.served if not one.refused]
    assert 0 < len(served) < len(chosen.served)
    assert sum(one.good for one in served) / len(served) > 0.9


def test_steps_slower_than_believed_are_learned() -> None:
    """Admission by the costs of the start would let in twice what can be served."""
    spec = replace(SPEC, slowdown=1.5, jitter=0.2)
    outcome = simulate(fleet(P, D, admission=Admission.SLO, spec=spec), load(160.0, count=900))
    served = [one for one in outcome.served if not one.refused]
    assert sum(one.good for one in served) / len(served) > 0.85


def test_the_adaptive_policy_is_no_worse_than_the_static_ones() -> None:
    """The table in small."""
    spec = WorkerSpec(EIGHT_B_ON_H200, 880_000 // 64, 64)
    cell, setting = Cell("code", 200.0, 15.0, 2, 250), Setting(spec)
    found = look_all(searches_of(cell, ours=False), setting, 1)
    row = row_of(cell, found)
    assert row is not None and row.ratio is not None and row.ratio >= 0.98, row
    assert cell.workload in table([row])
    larger = Search(replace(cell, gpus=3), Kind.ADAPTIVE)
    hinted = look_all([*found, larger], setting, 1)[larger]
    alone = look(larger, setting)
    assert hinted.runs < alone.runs
    assert hinted.rate == pytest.approx(alone.rate, rel=0.05)


def test_prompts_that_are_read_beside_a_batch_come_when_it_was_said() -> None:
    """On one worker that is near its objective: what its streams are ahead by goes to prompts."""
    lengths = poisson(synthetic(2048, 256, 800, 1), 5.0, 800, 1)
    near = fleet(M, admission=Admission.SLO, spec=replace(eight_b_on_h200(), jitter=0.1))
    outcome = simulate(near, arrivals(lengths, 200.0, 10.0))
    off = [
        one.ttft_forecast_ms / one.ttft_ms - 1.0
        for one in outcome.served
        if not one.refused and one.ttft_forecast_ms is not None
    ]
    assert len(off) > 500
    assert abs(statistics.median(off)) < 0.05
    assert statistics.median(map(abs, off)) < 0.15


def test_the_planner_turns_a_wrong_split_into_a_right_one() -> None:
    """Long prompts and short answers, and one worker of four to read them."""
    split = fleet(P, D, D, D, policy=Policy.DISAGGREGATED)
    prompts = load(40.0, count=2400, prompt=1500, output=16)
    fixed, planned = (simulate(replace(split, planned=on), prompts) for on in (False, True))
    assert fixed.attainment < 0.2 and fixed.moves == 0
    assert planned.attainment > 0.7 and 1 <= planned.moves <= 3
    assert all(served.last is not None for served in planned.served)


def test_capacity_is_where_nine_in_ten_are_in_time() -> None:
    def at(rate: float) -> list[Arrival]:
        return load(rate)

    alone = fleet(M, policy=Policy.COLOCATED)
    found = find(alone, at, 5.0, least=0.1)
    assert found.low is not None and found.high is not None
    assert found.low.attainment >= 0.9 > found.high.attainment
    assert found.low.rate <= found.rate <= found.high.rate
    assert simulate(alone, at(found.rate * 1.1)).attainment < 0.9
    impossible = [replace(row, ttft_ms=1.0) for row in at(1.0)]
    assert find(alone, lambda _: impossible, 5.0, least=0.1).rate == 0.0


def test_the_best_of_several_is_the_one_that_reaches_most() -> None:
    """Whatever the order in which they are given, and whoever survives the first rate."""

    def at(rate: float) -> list[Arrival]:
        return load(rate, count=80, output=16)

    chunks = [replace(SPEC, paced=False, chunk_tokens=chunk) for chunk in (128, 512)]
    fleets = [
        replace(fleet(M, policy=Policy.COLOCATED, spec=spec), name=f"chunk {spec.chunk_tokens}")
        for spec in chunks
    ]
    reached = [find(one, at, 20.0, least=0.1).rate for one in fleets]
    for guess in (10.0, 60.0):
        for order in (fleets, fleets[::-1]):
            found = best_of(order, at, guess, least=0.1)
            assert found.name == fleets[reached.index(max(reached))].name
            assert found.rate == pytest.approx(max(reached), rel=0.02)


def test_a_ratio_of_a_policy_to_itself_is_one_whatever_is_drawn() -> None:
    def at(rate: float) -> list[Arrival]:
        return load(rate, count=150)

    one = find(fleet(M, policy=Policy.COLOCATED), at, 40.0, least=0.1)
    other = find(fleet(P, D, policy=Policy.DISAGGREGATED), at, 40.0, least=0.1)
    low, high = ratio_interval(one, one, 1) or (0.0, 0.0)
    assert low == high == 1.0
    low, high = ratio_interval(other, one, 1) or (0.0, 0.0)
    assert low < other.rate / one.rate < high


def test_a_search_that_was_interrupted_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of writing a run down, it takes those before it."""
    search = Search(Cell("code", 200.0, 10.0, 2, 250), Kind.COLOCATED)
    spec = WorkerSpec(EIGHT_B_ON_H200, 880_000 // 64, 64)
    setting = Setting(spec, kept=tmp_path)
    whole = look(search, setting)
    (kept,) = tmp_path.iterdir()
    text = kept.read_text()
    kept.write_text(text[: len(text) * 2 // 3])
    runs = []
    monkeypatch.setattr(
        "pdserve.simulation.capacity.simulate",
        lambda *args, **more: runs.append(args) or simulate(*args, **more),
    )
    assert look(search, setting) == whole
    assert 0 < len(runs) < whole.runs / 2 and kept.read_text() == text
    assert look(search, setting) == whole and len(runs) < whole.runs / 2
    with pytest.raises(ConfigError, match="other workers"):
        look(search, replace(setting, spec=replace(spec, slowdown=1.15)))


def test_what_is_found_does_not_depend_on_how_many_look_for_it() -> None:
    """A larger fleet's search begins where the smaller one's ended, whoever is done first."""
    cells = [Cell("code", 200.0, 10.0, gpus, 100) for gpus in (4, 2)]
    searches = [Search(cell, kind) for cell in cells for kind in (Kind.ADAPTIVE, Kind.COLOCATED)]
    setting = Setting(WorkerSpec(EIGHT_B_ON_H200, 880_000 // 64, 64))
    told: list[Search] = []
    alone = look_all(searches, setting, 1, lambda search, _: told.append(search))
    assert set(told) == set(searches) and len(told) == 4
    assert look_all(searches, setting, 3) == alone


def test_a_run_lasts_many_times_as_long_as_a_request_may() -> None:
    """At 100 ms a token an answer of 256 may take 25 s: too few requests would end the run while
    those that wait for a place are still in time."""
    cell = Cell("chat", 2000.0, 100.0, 8, 3000)
    rows = cell.load(WorkerSpec(EIGHT_B_ON_H200, 1000, 64), None)(50.0)
    assert rows[-1].time - rows[0].time == pytest.approx(8 * (2.0 + 25.6), rel=0.05)
    assert len(replace(cell, tpot_ms=10.0).load(SPEC, None)(50.0)) == 3000


def test_a_cell_whose_prompts_alone_take_longer_is_met_by_nobody() -> None:
    spec = WorkerSpec(EIGHT_B_ON_H200, 880_000 // 64, 64)
    cell = Cell("summarise", 200.0, 15.0, 2, 250)
    found = look_all(searches_of(cell), Setting(spec), 1)
    row = row_of(cell, found)
    assert row is not None and not row.met and row.runs == 0 and row.ratio is None
    assert "No policy meets: summarise 200/15 x2" in table([row])


def test_the_worst_phase_of_a_load_is_what_counts() -> None:
    """Short prompts in the first and third second, long ones that nobody can serve between; the
    first two seconds are not judged."""
    kinds = [[Length(100, 4)], [Length(100, 4), Length(30_000, 4)]]

    def made(phases: int) -> list[Arrival]:
        return shifting(kinds, [40.0, 8.0], 500.0, 30.0, phases=phases, phase_s=1.0, seed=1)

    assert [sorted({one.phase for one in made(n)}) for n in (3, 4)] == [[-1, 2], [-1, 2, 3]]
    served = simulate(fleet(M, M), made(4))
    shares = []
    for phase in (2, 3):
        good = [one.good for one in served.served if one.arrival.phase == phase]
        shares.append(sum(good) / len(good))
    assert served.attainment == min(shares) < max(shares)
    assert all(one.arrival.time >= 2.0 for one in served.served)


def test_a_load_that_shifts_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every kind of static policy, in phases of seconds."""
    monkeypatch.setattr("pdserve.simulation.shifting.PHASE_S", 4.0)
    shift = Shift(((1024, 8), (64, 32)), 4000.0, 150.0, 2)
    setting = Setting(replace(SPEC, cost=COST.scaled(10.0, 10.0)))
    row = row_of_shift(shift, look_all(shifts_searches(shift), setting, 1))
    assert row is not None
    assert row.split.name == "split 1:1" and row.static.ratio is not None
    assert row.static.ratio == row.planned / row.static.rate
    assert row.static.rate >= row.split.rate > 0.0 < row.ours.rate
    assert "1024/8 <-> 64/32 at 4000/150 x2" in line(row)


def test_a_prefix_that_lies_on_a_worker_is_found_there() -> None:
    spec = replace(SPEC, prefix_cache=True)
    names = tuple(b"%d" % index for index in range(62))
    rows = [
        Arrival(float(second), 1000, 4, 500.0, 30.0, names) for second in range(6)
    ]  # a conversation that comes back
    served = simulate(fleet(P, D, P, D, spec=spec), rows).served
    assert [one.num_cached_tokens for one in served[-3:]] == [992, 992, 992]
    assert served[-1].ttft_ms < served[0].ttft_ms / 2 or served[-1].ttft_ms < 10.0


def test_the_coefficients_are_those_that_were_measured() -> None:
    found = read_steps(ROOT / "docs" / "results" / "h200-8b-steps.json")
    for n in (512, 2048, 8192):
        assert EIGHT_B_ON_H200.prefill.ms(n) == pytest.approx(found.prefill.ms(n), rel=1e-3)
    for batch in (1, 64, 256):
        expected = found.decode.ms(batch, batch * 1000)
        assert EIGHT_B_ON_H200.decode.ms(batch, batch * 1000) == pytest.approx(expected, rel=1e-3)


# traces


def test_traces_are_read(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv.gz"
    azure.write_bytes(
        gzip.compress(
            b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
            b"2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.4799600,110,27\n"
        )
    )
    first, second = read_trace(azure)
    assert (first.prompt, first.output, first.time) == (4808, 10, 0.0)
    assert second.time == pytest.approx(1.5)
    mooncake = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 1000, "input_length": 600, "output_length": 6, "hash_ids": [7, 4]},
    ]
    mooncake.write_text("\n".join(map(json.dumps, rows)))
    earlier, later = read_trace(mooncake)
    assert (earlier.time, later.time, later.hash_ids) == (0.0, 2.0, (7, 8, 9))
    named = arrivals([earlier, later], 500.0, 30.0, 256)
    assert [len(one.block_hashes) for one in named] == [2, 4]
    assert named[0].block_hashes == named[1].block_hashes[:2]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", '{"timestamp": 1}\n', "\x00"])
def test_what_is_no_trace_is_refused_in_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        read_trace(path)


def test_a_trace_keeps_its_bursts_at_another_rate() -> None:
    trace = [Length(10, 10, time) for time in (0.0, 1.0, 1.0, 4.0)]
    assert [row.time for row in rescaled(trace, 3.0, 4)] == pytest.approx([0.0, 0.25, 0.25, 1.0])


# the command


def test_the_command_prints_a_row_for_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "configs" / "two-gpu.yaml")
    arguments = ["simulate", file, "--trace", "512/32", "--rate", "10", "--requests", "200"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:]] == [
        "adaptive",
        "colocated",
        "disaggregated",
    ]
    assert cli.main([*arguments, "--json", "--capacity"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["attainment"] == 1.0 and row["capacity"] > 10 for row in rows)


def test_the_command_refuses_what_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "configs" / "two-gpu.yaml")
    assert cli.main(["simulate", file, "--trace", "/none", "--rate", "1"]) == 2
    assert "/none" in capsys.readouterr().err
    assert cli.main(["simulate", file, "--trace", "512/32", "--rate", "0"]) == 2
    assert cli.main(["simulate", file, "--trace", "9000/32", "--rate", "1", "--kv-tokens=99"]) == 2
