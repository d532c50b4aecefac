"""What is asked: lengths, what prompts share, and files of real requests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from pdserve.bench.slo.prompts import PromptKind, PromptMaker, length_of
from pdserve.bench.slo.runs import LoadSpec
from pdserve.bench.slo.workloads import Session, parse
from pdserve.core.errors import ConfigError

MAKER = PromptMaker()
TIMES = [float(i) for i in range(60)]


def sessions(text: str, maker: PromptMaker = MAKER, **options: float) -> list[Session]:
    found = parse(
        text, maker, lengths=options.get("lengths", 1.0), context=int(options.get("context", 0))
    )
    return found.sessions(TIMES, 60.0)


def lengths(found: list[Session]) -> list[tuple[int, int]]:
    return [(length_of(s.asks[0].prompt), s.asks[0].num_output) for s in found]


def test_fixed_and_scaled() -> None:
    assert set(lengths(sessions("2048/256"))) == {(2048, 256)}
    assert set(lengths(sessions("fixed:2048/256", lengths=0.125))) == {(256, 32)}
    assert set(lengths(sessions("2048/256", context=1024))) == {(768, 256)}
    assert [s.at for s in sessions("8/8")] == TIMES


def test_uniform_stays_within_its_bounds() -> None:
    found = lengths(sessions("uniform:10-20/5-6"))
    assert {n for n, _ in found} <= set(range(10, 21)) and len({n for n, _ in found}) > 5
    assert {n for _, n in found} == {5, 6}


def test_a_mix_shifts_with_time_and_back() -> None:
    found = lengths(sessions("mix:100/1+1/100"))
    assert found == [(100, 1)] * 15 + [(1, 100)] * 15 + [(100, 1)] * 15 + [(1, 100)] * 15


def test_prompts_differ_and_repeat_by_seed() -> None:
    prompts = [s.asks[0].prompt for s in sessions("64/4")]
    assert len(set(prompts)) == len(prompts)
    assert prompts == [s.asks[0].prompt for s in sessions("64/4")]
    other = sessions("64/4", PromptMaker(seed=1))
    assert prompts[0] != other[0].asks[0].prompt


def test_rag_prompts_begin_with_one_of_a_few_documents() -> None:
    starts = {s.asks[0].prompt[:2048] for s in sessions("rag")}
    assert 2 <= len(starts) <= 8


def test_turns_grow_from_what_was_said_before() -> None:
    for session in sessions("multi-turn", context=2048):
        for before, after in zip(session.asks, session.asks[1:], strict=False):
            assert isinstance(after.prompt, tuple) and isinstance(before.prompt, tuple)
            grown = len(before.prompt) + before.num_output
            assert after.prompt[: len(before.prompt)] == before.prompt
            assert len(after.prompt) > grown and after.think_s > 0
            assert len(after.prompt) + after.num_output <= 2048


def test_medians_of_a_preset() -> None:
    maker = PromptMaker()
    found = parse("chat", maker).sessions([0.0] * 800, 1.0)
    assert np.median([n for n, _ in lengths(found)]) == pytest.approx(1020, rel=0.15)
    assert np.median([n for _, n in lengths(found)]) == pytest.approx(129, rel=0.15)


def test_text_prompts_have_as_many_words() -> None:
    (first, *_) = sessions("32/4", PromptMaker(PromptKind.TEXT))
    assert isinstance(first.asks[0].prompt, str) and len(first.asks[0].prompt.split()) == 32


@pytest.mark.parametrize(
    "text", ["", "chat:x", "2048", "uniform:1-2/3", "uniform:9-2/3-4", "0/3", "mix:1/2+x", "walk"]
)
def test_what_is_no_workload(text: str) -> None:
    with pytest.raises(ConfigError, match="--workload: found"):
        sessions(text)


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9305900,396,109
"""
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 3500, "input_length": 1030, "output_length": 7, "hash_ids": [0, 1, 3]},
]


def test_mooncakes_trace_and_what_its_prompts_share(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, MOONCAKE)).encode()))
    found = parse(f"trace:{file}", MAKER)
    assert found.times == (0.0, 2.5)
    one, other = (s.asks[0].prompt for s in found.sessions([0.0, 2.5], 3.0))
    assert (len(one), len(other)) == (1100, 1030)
    assert one[:1024] == other[:1024] and one[1024:] != other[1024:]


def test_a_trace_is_replayed_faster_or_at_a_rate(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE)
    twice = LoadSpec(f"trace:{file}", arrivals="trace", time_scale=2.0, warmup_s=0.0)
    assert [s.at for s in twice.sessions(0)] == pytest.approx([0.0, 2.125])
    paced = LoadSpec(f"trace:{file}", arrivals="trace", rate=10.0, warmup_s=0.0)
    assert [s.at for s in paced.sessions(0)] == pytest.approx([0.0, 0.1])


def test_conversations_become_requests_with_what_was_said(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    turns = [("human", "hello"), ("gpt", "x" * 40), ("human", "more"), ("gpt", "y" * 8)]
    rules = [{"role": "system", "content": rule} for rule in ("be brief", "be kind")]
    messages = [
        *rules,
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "z" * 20},
    ]
    lines = [
        {"conversations": [{"from": who, "value": text} for who, text in turns]},
        {"messages": messages},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    first, second = sessions(f"conversations:{file}")[:2]
    assert [ask.num_output for ask in first.asks] == [10, 2]
    assert [len(ask.prompt) for ask in first.asks] == [1, 3]
    assert [ask.think_s > 0 for ask in first.asks] == [False, True]
    assert second.asks[0].prompt == (*rules, {"role": "user", "content": "hi"})
    assert second.asks[0].think_s == 0  # nothing was answered before
    file.write_text('{"messages": 3}')
    with pytest.raises(ConfigError, match="line 1 is no conversation"):
        sessions(f"conversations:{file}")


def test_loads_that_can_not_be() -> None:
    for wrong in (
        LoadSpec("8/8"),
        LoadSpec("8/8", rate=1.0, concurrency=2),
        LoadSpec("8/8", rate=1.0, duration_s=3.0, warmup_s=3.0),
        LoadSpec("8/8", rate=-1.0),
        LoadSpec("8/8", rate=1.0, arrivals="trace"),
    ):
        with pytest.raises(ConfigError):
            wrong.sessions(0)
