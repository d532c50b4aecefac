"""The engine on a GPU: close to the fp32 reference, with graphs and without, never waiting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import SIZES, Answers, random_prompt
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pdserve.bench.driver import StepDriver
from pdserve.core.params import SamplingParams
from pdserve.core.plan import NewSequence, Row, SampledToken, StepPlan
from pdserve.engine.batch import describe
from pdserve.engine.build import GRAPHS_SWITCH
from pdserve.engine.engine import TorchEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=32),
    "qwen2": Qwen2Config(**{**SIZES, "num_attention_heads": 4}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
}
# How far a chosen token's logit may lie under the reference's best, in standard deviations
# of the logits at that position.
GAPS = {"fp32": 0.02, "bf16": 0.3}
LENGTHS = (1, 2, 15, 16, 17, 100, 300)
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / str(request.param)
    tiny_models.save(CONFIGS[request.param], made)
    return made


@pytest.fixture(scope="module")
def reference(folder: Path) -> Answers:
    return Answers(folder)


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ids(tokens: Sequence[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.mark.parametrize("graphs", [True, False])
def test_tokens_are_the_references_best(
    graphs: bool, dtype: str, folder: Path, reference: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GRAPHS_SWITCH, "1" if graphs else "0")
    engine = tiny_models.engine_of(folder, device="cuda:0", dtype=dtype)
    assert (engine._graphs is not None) == graphs
    assert engine.limits.max_inflight == 2
    prompts = [random_prompt(length, seed=1) for length in LENGTHS]
    blocks = range(engine.kv.layout.num_blocks)[::-3]
    driver = StepDriver(engine, blocks)
    found = driver.run(prompts, [GREEDY] * len(prompts), chunk_tokens=90)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert reference.largest_gap(prompt, ids(tokens)) < GAPS[dtype], len(prompt)
    again = driver.run(prompts, [GREEDY] * len(prompts), chunk_tokens=90)
    assert [ids(tokens) for tokens in again] == [ids(tokens) for tokens in found]


def test_graphs_change_nothing_at_their_own_sizes(
    dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1, 2, 4 and 8 rows there is no padding: log-probabilities agree closely."""
    wanted = SamplingParams(max_tokens=20, temperature=0.0, logprobs=0)
    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv(GRAPHS_SWITCH, switch)
        engine = tiny_models.engine_of(folder, device="cuda:0", dtype=dtype)
        results.append(
            [
                StepDriver(engine).run(
                    [random_prompt(30, seed=n) for n in range(rows)], [wanted] * rows
                )
                for rows in (1, 2, 4, 8)
            ]
        )
    for captured, eager in zip(*results, strict=True):
        for one, other in zip(captured, eager, strict=True):
            for left, right in zip(one, other, strict=True):
                if left.token_id != right.token_id:
                    break  # a near-tie in bf16: what follows is another text
                assert left.logprob == pytest.approx(right.logprob, abs=2 * GAPS[dtype])


def test_a_whole_step_draws_what_its_layers_do(
    dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows and two chunks, one behind a prefix: one graph, or launch by launch."""
    wanted = SamplingParams(max_tokens=20, temperature=0.0, logprobs=0)

    def sequence(slot: int, length: int) -> NewSequence:
        blocks = tuple(range(8 * slot, 8 * slot + 8))
        return NewSequence(slot, random_prompt(length, seed=slot), length, wanted, blocks)

    results = []
    for switch in ("1", "0"):
        monkeypatch.setenv(GRAPHS_SWITCH, switch)
        engine = tiny_models.engine_of(folder, device="cuda:0", dtype=dtype)
        before = tuple(sequence(slot, 21 + slot) for slot in range(3))
        rows = tuple(Row(slot, 0, 20 + slot) for slot in range(3))
        engine.launch(StepPlan(before, rows)).wait()
        engine.launch(StepPlan((sequence(3, 90),), (Row(3, 0, 33, sample=False),))).wait()
        plan = StepPlan(
            (sequence(4, 17),),
            (*(Row(slot, 20 + slot, 1) for slot in range(3)), Row(3, 33, 57), Row(4, 0, 17)),
        )
        if engine._whole_graphs is not None:
            engine._table.apply(plan)
            assert engine._whole_graphs.size_for(describe(plan, engine._table)) is not None
        results.append(engine.launch(plan).wait())
    for captured, eager in zip(*(result.tokens for result in results), strict=True):
        assert captured.logprob == pytest.approx(eager.logprob, abs=2 * GAPS[dtype])


def test_padding_rows_do_no_harm(dtype: str, folder: Path, reference: Answers) -> None:
    """Three rows run in the graph of four, five and seven in that of eight."""
    engine = tiny_models.engine_of(folder, device="cuda:0", dtype=dtype)
    prompts = [random_prompt(40, seed=n) for n in range(7)]
    for rows in (3, 5, 7):
        found = StepDriver(engine).run(prompts[:rows], [GREEDY] * rows)
        for prompt, tokens in zip(prompts, found, strict=False):
            assert reference.largest_gap(prompt, ids(tokens)) < GAPS[dtype]


@pytest.mark.parametrize("graphs", [True, False])
def test_launching_never_waits_for_the_device(
    graphs: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GRAPHS_SWITCH, "1" if graphs else "0")
    engine = tiny_models.engine_of(folder, device="cuda:0")
    fancy = SamplingParams(
        max_tokens=9,
        temperature=0.9,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        logprobs=3,
        logit_bias=((5, 1.0),),
        min_tokens=4,
    )
    params = [GREEDY, fancy, GREEDY, fancy]
    prompts = [random_prompt(n, seed=9) for n in (1, 70, 30, 5)]
    StepDriver(engine).run(prompts, params, chunk_tokens=40)  # compiles kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = StepDriver(engine).run(prompts, params, chunk_tokens=40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(tokens) for tokens in found] == [wanted.max_tokens for wanted in params]


def test_two_steps_in_flight_draw_what_one_does(folder: Path) -> None:
    engine = tiny_models.engine_of(folder, device="cuda:0")
    prompt, blocks = random_prompt(20, seed=4), (3, 1, 2)
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=8, presence_penalty=0.5)
    sequence = NewSequence(0, tuple(prompt), len(prompt), params, blocks)
    plans = [StepPlan((sequence,), (Row(0, 0, 20),))]
    plans += [StepPlan((), (Row(0, 20 + step, 1),)) for step in range(9)]
    waited = [ids(engine.launch(plan).wait().tokens) for plan in plans]
    handles = [engine.launch(plan) for plan in plans]  # none of them read before the last
    assert [ids(handle.wait().tokens) for handle in handles] == waited
    assert handles[0].wait() is handles[0].wait()


def test_blocks_go_to_a_cpu_and_back(folder: Path, reference: Answers) -> None:
    """Prefill here, decode there: fp32 blocks are the same bytes on both."""
    gpu = tiny_models.engine_of(folder, device="cuda:0", dtype="fp32")
    cpu = tiny_models.engine_of(folder, dtype="fp32")
    assert gpu.kv.layout == cpu.kv.layout
    prompt, mine, theirs = random_prompt(45, seed=20), (11, 3, 8, 4), (5, 6, 2, 9)
    for source, target in ((gpu, cpu), (cpu, gpu)):
        tokens = one_step(source, NewSequence(0, tuple(prompt), 45, GREEDY, mine), Row(0, 0, 45))
        target.kv.write(theirs, [memoryview(bytes(view)) for view in source.kv.read(mine)])
        whole = (*prompt, *tokens)
        sequence: NewSequence | None = NewSequence(4, whole, 45, GREEDY, theirs)
        for step in range(12):
            tokens += one_step(target, sequence, Row(4, 45 + step, 1))
            sequence = None
        assert reference.largest_gap(prompt, tokens) < GAPS["fp32"]


def test_bytes_of_a_pool(dtype: str, folder: Path) -> None:
    pool = tiny_models.engine_of(folder, device="cuda:0", dtype=dtype).kv
    size = pool.layout.block_bytes
    data = [torch.randint(0, 255, (size,), dtype=torch.uint8).numpy().tobytes() for _ in range(3)]
    pool.write([4, 0, 7], [memoryview(piece) for piece in data])
    assert [bytes(view) for view in pool.read([7, 4, 0])] == [data[2], data[0], data[1]]
    pool.zero_tail(0, pool.layout.block_size)
    (kept,) = pool.read([0])
    assert bytes(kept) == data[1]
    pool.zero_tail(0, 0)
    assert bytes(pool.read([0])[0]) == bytes(size)
    assert bytes(kept) == data[1], "what was read is a copy"


def one_step(engine: TorchEngine, sequence: NewSequence | None, row: Row) -> list[int]:
    plan = StepPlan((sequence,) if sequence is not None else (), (row,))
    return ids(engine.launch(plan).wait().tokens)
