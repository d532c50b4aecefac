"""The simulated engine's answers depend on every byte of KV that it was given."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.params import SamplingParams
from pdserve.core.plan import Engine, NewSequence, Row, StepPlan
from pdserve.simulation.engine import SimulatedEngine, SimulatedModel, pace

MODEL = SimulatedModel(vocab_size=100, eos_token_ids=(2, 3))
GREEDY = SamplingParams(max_tokens=1000, temperature=0.0)
PROMPT = tuple(range(10, 31))  # 21 tokens: 6 blocks of 4, the last with one token


def make_engine(**options: object) -> SimulatedEngine:
    return SimulatedEngine(MODEL, num_blocks=64, block_size=4, **options)  # type: ignore[arg-type]


def as_protocol(engine: SimulatedEngine) -> Engine:
    return engine  # mypy's word that the seam is kept


def blocks_for(num_tokens: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + -(-num_tokens // 4)))


def new(
    slot: int,
    tokens: tuple[int, ...],
    blocks: tuple[int, ...],
    params: SamplingParams = GREEDY,
    num_prompt_tokens: int | None = None,
) -> NewSequence:
    return NewSequence(slot, tokens, num_prompt_tokens or len(tokens), params, blocks)


def run(engine: SimulatedEngine, plan: StepPlan) -> list[int]:
    return [token.token_id for token in engine.launch(plan).wait().tokens]


def decode(engine: SimulatedEngine, slot: int, start: int, count: int, free: int) -> list[int]:
    """Token by token from ``start``; new blocks are taken from ``free`` on."""
    tokens = []
    for position in range(start, start + count):
        extra: tuple[int, ...] = ()
        if position % 4 == 0:
            extra, free = (free,), free + 1
        tokens += run(engine, StepPlan((), (Row(slot, position, 1, extra),)))
    return tokens


def test_whole_prompt_then_decode_gives_the_expected_tokens() -> None:
    engine = make_engine()
    assert as_protocol(engine).limits.eos_token_ids == (2, 3)
    plan = StepPlan((new(0, PROMPT, blocks_for(21)),), (Row(0, 0, 21),))
    tokens = run(engine, plan) + decode(engine, 0, 21, 30, free=6)
    assert tokens == MODEL.expected_tokens(PROMPT, (), GREEDY, 31)
    assert len(set(tokens)) > 10  # not a constant


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 20), max_size=5), cached=st.integers(0, 5))
def test_chunks_and_cached_prefixes_change_nothing(cuts: list[int], cached: int) -> None:
    engine = make_engine()
    run(engine, StepPlan((new(7, PROMPT, blocks_for(21)),), (Row(7, 0, 21),)))
    table = (*range(cached), *blocks_for(21 - 4 * cached, first=20))
    starts = sorted({4 * cached, *(cut for cut in cuts if cut > 4 * cached)})
    fresh: tuple[NewSequence, ...] = (new(0, PROMPT, table),)
    for start, end in zip(starts, (*starts[1:], 21), strict=True):
        row = Row(0, start, end - start, sample=end == 21)
        tokens = run(engine, StepPlan(fresh, (row,)))
        fresh = ()
    assert tokens == MODEL.expected_tokens(PROMPT, (), GREEDY, 1)


def test_blocks_copied_into_another_pool_go_on_there() -> None:
    source, target = make_engine(), make_engine()
    first = run(source, StepPlan((new(0, PROMPT, blocks_for(21)),), (Row(0, 0, 21),)))
    theirs = (40, 9, 33, 2, 17, 50)
    target.kv.write(theirs, source.kv.read(range(6)))
    tokens = (*PROMPT, *first)
    rest = run(target, StepPlan((new(3, tokens, theirs, num_prompt_tokens=21),), (Row(3, 21, 1),)))
    assert first + rest == MODEL.expected_tokens(PROMPT, (), GREEDY, 2)


@pytest.mark.parametrize("harm", ["lost", "swapped", "stale", "one bit"])
def test_a_harmed_block_gives_a_wrong_token(harm: str) -> None:
    engine = make_engine()
    first = run(engine, StepPlan((new(0, PROMPT, blocks_for(21)),), (Row(0, 0, 21),)))
    copies = [bytes(view) for view in engine.kv.read(range(6))]
    match harm:
        case "lost":
            copies[1] = bytes(len(copies[1]))
        case "swapped":
            copies[1], copies[2] = copies[2], copies[1]
        case "stale":
            copies[3] = copies[2]
        case "one bit":
            copies[0] = bytes([copies[0][0] ^ 1]) + copies[0][1:]
    engine.kv.write(range(6), [memoryview(copy) for copy in copies])
    rest = run(engine, StepPlan((), (Row(0, 21, 1),)))
    assert first + rest != MODEL.expected_tokens(PROMPT, (), GREEDY, 2)


def test_a_replay_with_output_draws_the_same_tokens() -> None:
    params = SamplingParams(max_tokens=50, temperature=0.7, seed=5)
    answer = MODEL.expected_tokens(PROMPT, (), params, 12)
    tokens = (*PROMPT, *answer[:5])
    engine = make_engine()
    sequence = new(0, tokens, blocks_for(26), params, num_prompt_tokens=21)
    drawn = run(engine, StepPlan((sequence,), (Row(0, 0, 26),)))
    assert drawn + decode(engine, 0, 26, 6, free=30) == answer[5:]
    assert answer[5:] == MODEL.expected_tokens(PROMPT, answer[:5], params, 7)
    assert answer != MODEL.expected_tokens(PROMPT, (), replace(params, seed=6), 12)
    assert answer != MODEL.expected_tokens(PROMPT, (), replace(params, choice=1), 12)


def test_ends_vary_and_min_tokens_hold_them_off() -> None:
    model = replace(MODEL, eos_probability=0.2)
    params = SamplingParams(max_tokens=60, temperature=1.0, min_tokens=5, stop_token_ids=(11, 12))
    lengths = set()
    for seed in range(40):
        answer = model.expected_tokens(PROMPT, (), replace(params, seed=seed), 60)
        assert not {2, 3, 11, 12} & set(answer[:5]), answer
        lengths.add(len(answer))
    assert min(lengths) > 5 and len(lengths) > 5
    never_ends = model.expected_tokens(PROMPT, (), replace(params, ignore_eos=True), 20)
    assert len(never_ends) == 20 or never_ends[-1] in (11, 12)


def test_two_steps_in_flight_feed_their_tokens_back() -> None:
    engine = make_engine(max_inflight=2)
    sequences = (new(0, PROMPT, blocks_for(24)), new(1, PROMPT[:9], blocks_for(12, first=20)))
    one = engine.launch(StepPlan(sequences, (Row(0, 0, 21), Row(1, 0, 9))))
    two = engine.launch(StepPlan((), (Row(0, 21, 1), Row(1, 9, 1))))
    with pytest.raises(AssertionError, match="in flight"):
        engine.launch(StepPlan((), ()))
    late, early = two.wait(), one.wait()
    for index, prompt in enumerate((PROMPT, PROMPT[:9])):
        drawn = [early.tokens[index].token_id, late.tokens[index].token_id]
        assert drawn == MODEL.expected_tokens(prompt, (), GREEDY, 2)
    assert two.wait() is late


def test_a_step_in_flight_has_not_computed_yet() -> None:
    engine = make_engine()
    step = engine.launch(StepPlan((new(0, PROMPT, blocks_for(21)),), (Row(0, 0, 21),)))
    too_early = bytes(engine.kv.read([0])[0])
    step.wait()
    assert too_early != bytes(engine.kv.read([0])[0])


def test_writing_another_rows_block_is_a_bug() -> None:
    engine = make_engine()
    plan = StepPlan(
        (new(0, PROMPT[:4], (5,)), new(1, PROMPT[:4], (5,))), (Row(0, 0, 4), Row(1, 0, 4))
    )
    with pytest.raises(AssertionError, match="another row"):
        engine.launch(plan).wait()


def test_latency_is_that_of_a_device_doing_one_step_after_the_other() -> None:
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    engine = make_engine(
        max_inflight=2, latency=lambda plan: 0.5, clock=lambda: now[0], sleep=sleep
    )
    one = engine.launch(StepPlan((new(0, PROMPT, blocks_for(24)),), (Row(0, 0, 21),)))
    two = engine.launch(StepPlan((), (Row(0, 21, 1),)))
    one.wait()
    assert now[0] == pytest.approx(100.5)
    two.wait()
    assert now[0] == pytest.approx(101.0)


def test_logprobs_are_reported_where_asked() -> None:
    engine = make_engine()
    params = replace(GREEDY, logprobs=3)
    plan = StepPlan((new(0, PROMPT, blocks_for(21), params),), (Row(0, 0, 21),))
    (token,) = engine.launch(plan).wait().tokens
    assert token.logprob is not None and len({token_id for token_id, _ in token.top}) == 3
    assert token.top[0] == (token.token_id, token.logprob)


def test_zero_tail_leaves_the_head_alone() -> None:
    engine = make_engine()
    run(engine, StepPlan((new(0, PROMPT[:4], (5,)),), (Row(0, 0, 4),)))
    before = bytes(engine.kv.read([5])[0])
    engine.kv.zero_tail(5, 3)
    assert bytes(engine.kv.read([5])[0]) == before[: 3 * 64] + bytes(64)


def test_the_pace_of_an_engine_is_by_step_and_by_token() -> None:
    assert pace(0, 0) is None
    latency = pace(10, 0.5)
    assert latency is not None
    rows = (Row(0, 0, 40), Row(1, 7, 1))
    assert latency(StepPlan((), rows)) == pytest.approx(0.0305)
