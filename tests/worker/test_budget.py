from __future__ import annotations

import pytest

from pdserve.core.config import PoolSection
from pdserve.core.ids import Role
from pdserve.core.plan import EngineLimits
from pdserve.worker.budget import Budget


def limits(max_slots: int, max_step_tokens: int) -> EngineLimits:
    return EngineLimits(max_slots, 100, max_step_tokens, 10, (0,))


def test_a_decode_worker_takes_smaller_chunks_where_steps_are_long() -> None:
    chunks = {
        on_gpu: [Budget.of(role, PoolSection(), on_gpu=on_gpu).chunk_tokens for role in Role]
        for on_gpu in (True, False)
    }
    assert list(Role) == [Role.PREFILL, Role.DECODE, Role.MIXED]
    assert chunks == {True: [2048, 2048, 2048], False: [128, 64, 128]}


def test_the_file_overrules_the_role() -> None:
    pool = PoolSection(chunk_tokens=77, max_batch=5)
    budget = Budget.of(Role.DECODE, pool, on_gpu=True)
    assert (budget.chunk_tokens, budget.max_batch) == (77, 5)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_engine_made_for_a_budget_does_not_cut_it(role: Role, on_gpu: bool) -> None:
    budget = Budget.of(role, PoolSection(), on_gpu=on_gpu)
    assert budget.within(limits(budget.num_slots, budget.max_step_tokens)) == budget


def test_a_smaller_engine_cuts_it_and_leaves_room_for_prompts() -> None:
    budget = Budget(chunk_tokens=512, max_batch=64, prompt_slots=8)
    cut = budget.within(limits(max_slots=16, max_step_tokens=32))
    assert (cut.max_batch, cut.chunk_tokens) == (15, 31)
    cut = budget.within(limits(max_slots=100, max_step_tokens=32))
    assert cut.max_batch == 31
