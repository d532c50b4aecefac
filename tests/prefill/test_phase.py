from __future__ import annotations

import sequences

from pdserve.cache.kvcache import KvCache
from pdserve.cache.retired import RetiredSequences
from pdserve.cache.sequence import Sequence
from pdserve.core.messages import TokenItem
from pdserve.prefill.phase import GRACE_S, Chunk, PrefillPhase
from pdserve.prefill.prompt import Prompt, PromptKind, PromptState

TRANSFER, LOCAL, RECOMPUTE = PromptKind.TRANSFER, PromptKind.LOCAL, PromptKind.RECOMPUTE


class Bench:
    """A prefill phase with an engine that does each chunk at once."""

    def __init__(self, num_blocks: int = 16, max_tokens: int = 8) -> None:
        self.cache = KvCache(num_blocks, 4)
        self.retired = RetiredSequences(self.cache.release)
        self.phase = PrefillPhase(self.cache, self.retired, grant_wait_s=2.0)
        self.max_tokens = max_tokens
        self.local_waits = False  # for a place in the batch
        self.started: list[Prompt] = []
        self.dropped: list[Prompt] = []
        self.done: list[Sequence] = []  # local ones that have left for the batch

    def add(self, num_tokens: int, kind: PromptKind = TRANSFER) -> Prompt:
        prompt = Prompt(sequences.sequence(num_tokens), kind)
        self.phase.add(prompt)
        return prompt

    def schedule(self, max_starts: int = 8, spare: int | None = 0) -> list[Chunk]:
        chunks, dropped = self.phase.schedule(
            self.max_tokens,
            max_starts,
            lambda prompt: None if self.local_waits and prompt.kind is LOCAL else spare,
            self.started.append,
        )
        self.dropped += dropped
        for chunk in chunks:
            chunk.prompt.seq.num_scheduled_tokens += chunk.num_tokens
            chunk.prompt.seq.num_inflight += 1
        return chunks

    def complete(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            seq = chunk.prompt.seq
            seq.num_inflight -= 1
            seq.num_computed_tokens = chunk.start + chunk.num_tokens
            self.cache.store(seq)
            if chunk.sample:
                chunk.prompt.token = TokenItem(seq.key, 0, 1)
            if chunk.last:
                self.phase.computed(chunk.prompt)
                if chunk.prompt.kind is not TRANSFER:
                    self.done.append(seq)

    def step(self, spare: int | None = 0) -> list[tuple[Prompt, int, int]]:
        """One step, done: the prompts with the start and length of their chunks."""
        chunks = self.schedule(spare=spare)
        self.complete(chunks)
        self.check()
        return [(chunk.prompt, chunk.start, chunk.num_tokens) for chunk in chunks]

    def check(self) -> None:
        held = [*self.retired, *(prompt.seq for prompt in self.phase), *self.done]
        self.cache.check(held)


def test_a_long_prompt_is_cut_into_chunks_and_then_held() -> None:
    bench = Bench()
    prompt = bench.add(18)
    assert prompt.state is PromptState.WAITING and bench.cache.counts().held == 0
    assert bench.step() == [(prompt, 0, 8)]
    assert prompt.state is PromptState.COMPUTING
    assert bench.cache.counts().held == 5  # all of it, before its first chunk
    assert bench.step() == [(prompt, 8, 8)]
    assert prompt.token is None
    assert bench.step() == [(prompt, 16, 2)]
    assert prompt.state is PromptState.HOLDING and prompt.token is not None
    assert bench.step() == []
    bench.retired.add(bench.phase.remove(prompt.attempt).seq)
    bench.check()
    assert bench.cache.counts().held == 0


def test_short_prompts_share_a_step() -> None:
    bench = Bench()
    a, b, c = bench.add(3), bench.add(3), bench.add(3)
    assert bench.step() == [(a, 0, 3), (b, 0, 3), (c, 0, 2)]
    assert bench.step() == [(c, 2, 1)]


def test_only_the_last_chunk_samples() -> None:
    bench = Bench()
    bench.add(10)
    (first,) = bench.schedule()
    bench.complete([first])
    (last,) = bench.schedule()
    assert (first.last, first.sample, last.last, last.sample) == (False, False, True, True)
    bench.complete([last])
    bench.check()


def test_the_next_chunk_can_be_planned_before_the_last_one_is_read() -> None:
    bench = Bench()
    prompt = bench.add(12)
    first, second = bench.schedule(), bench.schedule()
    assert [(c.start, c.num_tokens) for c in (*first, *second)] == [(0, 8), (8, 4)]
    assert bench.schedule() == []
    bench.complete(first)
    assert prompt.state is PromptState.COMPUTING
    bench.complete(second)
    assert prompt.state is PromptState.HOLDING
    bench.check()


def test_a_cached_prefix_is_not_computed_again() -> None:
    bench = Bench()
    first = bench.add(9)
    bench.step()
    bench.step()
    again = Prompt(sequences.sequence(first.seq.token_ids), TRANSFER)
    bench.phase.add(again)
    assert bench.step() == [(again, 8, 1)]
    assert again.seq.num_cached_tokens == 8


def test_what_does_not_fit_stops_all_behind_it() -> None:
    bench = Bench(num_blocks=4)
    running, big, small = bench.add(9), bench.add(8), bench.add(2)
    bench.step()
    assert [p for p, *_ in bench.step()] == [running]
    assert bench.step() == []
    assert big.state is small.state is PromptState.WAITING
    bench.retired.add(bench.phase.remove(running.attempt).seq)
    assert [p for p, *_ in bench.step()] == [big]


def test_spare_blocks_are_kept() -> None:
    bench = Bench(num_blocks=4)
    bench.add(8)
    assert bench.step(spare=3) == []
    assert bench.step(spare=None) == []
    assert len(bench.step(spare=2)) == 1


def test_a_prompt_without_a_place_in_the_batch_holds_nobody_up() -> None:
    bench = Bench()
    local, transfer = bench.add(4, LOCAL), bench.add(4)
    bench.local_waits = True
    assert [prompt for prompt, *_ in bench.step()] == [transfer]
    assert local.state is PromptState.WAITING


def test_only_so_many_start_as_there_are_slots() -> None:
    bench = Bench()
    a, b = bench.add(2), bench.add(2)
    assert [chunk.prompt for chunk in bench.schedule(max_starts=1)] == [a]
    assert [chunk.prompt for chunk in bench.schedule(max_starts=1)] == [b]
    assert bench.started == [a, b]
    bench.check()


def test_the_order_is_recomputed_granted_dropped_new_and_then_age() -> None:
    bench = Bench(max_tokens=100)
    new, granted, dropped, recomputed = bench.add(2), bench.add(2), bench.add(2), None
    for prompt in (granted, dropped):
        bench.phase.remove(prompt.attempt)
        prompt.dropped = True
        bench.phase.add(prompt)
    bench.phase.grant(granted.attempt, now=0.0)
    recomputed = bench.add(2, RECOMPUTE)
    older = bench.add(2)
    assert bench.phase.urgent
    order = [prompt for prompt, *_ in bench.step()]
    assert order == [recomputed, granted, dropped, new, older]
    assert not bench.phase.urgent


def test_a_grant_moves_a_computing_prompt_to_the_front() -> None:
    bench = Bench()
    older, younger = bench.add(20, LOCAL), bench.add(20)
    bench.local_waits = True
    assert bench.step() == [(younger, 0, 8)]
    bench.local_waits = False
    assert bench.step() == [(older, 0, 8)]
    bench.phase.grant(younger.attempt, now=0.0)
    assert bench.step() == [(younger, 8, 8)]


def test_a_local_prompt_leaves_for_the_batch() -> None:
    bench = Bench()
    prompt = bench.add(4, LOCAL)
    bench.step()
    assert prompt.attempt not in bench.phase
    assert bench.done == [prompt.seq] and len(prompt.seq.block_table) == 1


def test_the_youngest_ungranted_prompts_are_dropped_for_room() -> None:
    bench = Bench(num_blocks=6, max_tokens=100)
    a, b, c = bench.add(8), bench.add(8), bench.add(8)
    bench.step()
    bench.phase.grant(c.attempt, now=0.0)
    assert bench.phase.make_room(5) == []  # not even both of the others would do
    assert bench.phase.make_room(2) == [b]
    assert b.state is PromptState.WAITING and b.seq.block_table == []
    assert a.state is c.state is PromptState.HOLDING
    assert bench.phase.urgent  # it goes before what is new
    bench.check()


def test_a_dropped_prompt_is_computed_again_but_its_token_stands() -> None:
    bench = Bench(num_blocks=2, max_tokens=100)
    prompt = bench.add(7)
    bench.step()
    token = prompt.token
    assert token is not None
    assert bench.phase.make_room(2) == [prompt]
    others = bench.cache.pool.allocate(2)  # somebody else needs them
    assert others is not None and bench.schedule() == []
    bench.cache.pool.release(others)
    (chunk,) = bench.schedule()
    assert chunk.last and not chunk.sample
    bench.complete([chunk])
    assert prompt.state is PromptState.HOLDING and prompt.token is token
    bench.check()


def test_a_prompt_with_rows_in_flight_is_not_dropped() -> None:
    bench = Bench(num_blocks=4)
    bench.add(16)
    chunks = bench.schedule()
    assert bench.phase.make_room(1) == []
    bench.complete(chunks)
    assert len(bench.phase.make_room(1)) == 1
    bench.check()


def test_where_all_stand_still_only_higher_ids_give_way() -> None:
    bench = Bench(num_blocks=4, max_tokens=100)
    low, high = bench.add(8), bench.add(8)
    bench.step()
    assert low.attempt.request_id < high.attempt.request_id
    assert bench.phase.make_room(2, above=high.attempt.request_id) == []
    assert bench.phase.make_room(2, above=low.attempt.request_id) == [high]
    bench.check()


def test_a_granted_prompt_that_lost_its_blocks_may_drop_others() -> None:
    bench = Bench(num_blocks=4, max_tokens=100)
    loser, other = bench.add(8), bench.add(8)
    loser.dropped = other.dropped = True
    bench.phase.remove(loser.attempt)
    bench.step()
    bench.phase.add(loser)
    filler = sequences.sequence(8)
    assert bench.cache.claim(filler)
    bench.done.append(filler)
    assert other.state is PromptState.HOLDING
    assert bench.step() == []  # ungranted, it waits
    bench.phase.grant(loser.attempt, now=0.0)
    assert [prompt for prompt, *_ in bench.step()] == [loser]
    assert bench.dropped == [other]


def test_a_stream_to_be_recomputed_may_drop_prompts_that_are_held() -> None:
    bench = Bench(num_blocks=4, max_tokens=100)
    held = bench.add(12)
    bench.step()
    stream = bench.add(8, RECOMPUTE)
    assert [prompt for prompt, *_ in bench.step()] == [stream]
    assert bench.dropped == [held]


def test_a_granted_prompt_without_blocks_expires() -> None:
    bench = Bench(num_blocks=2, max_tokens=100)
    prompt = bench.add(8)
    bench.step()
    bench.phase.make_room(2)
    assert bench.phase.expired(now=100.0) == []  # not granted: nobody waits for it
    bench.phase.grant(prompt.attempt, now=100.0)
    assert bench.phase.expired(now=101.9) == []
    assert bench.phase.expired(now=102.0) == [prompt]
    bench.step()
    assert bench.phase.expired(now=200.0) == []  # it has found room
    bench.check()


def test_it_knows_whether_blocks_will_come_back_by_themselves() -> None:
    bench = Bench(num_blocks=8, max_tokens=100)
    held = bench.add(8)
    assert not bench.phase.frees_blocks
    bench.step()
    assert not bench.phase.frees_blocks  # its peer may never have room
    bench.phase.grant(held.attempt, now=0.0)
    assert bench.phase.frees_blocks
    bench.retired.add(bench.phase.remove(held.attempt).seq)
    assert not bench.phase.frees_blocks
    bench.add(100 // 4, LOCAL)
    bench.max_tokens = 4
    bench.step()
    assert bench.phase.frees_blocks
    bench.check()


def test_a_prompt_can_be_removed_in_each_state() -> None:
    for steps in (0, 1, 2):
        bench = Bench()
        prompt = bench.add(16)
        for _ in range(steps):
            bench.step()
        assert prompt.state is list(PromptState)[steps]
        bench.retired.add(bench.phase.remove(prompt.attempt).seq)
        assert prompt.attempt not in bench.phase and bench.schedule() == []
        bench.check()
        assert bench.cache.counts().held == 0


def test_the_earliest_deadline_goes_first_and_priority_before_it() -> None:
    bench = Bench()
    late, soon, never, urgent = (bench.add(8) for _ in range(4))
    bench.phase.remove(late.attempt)
    bench.phase.remove(soon.attempt)
    bench.phase.remove(urgent.attempt)
    late.deadline, soon.deadline, urgent.priority = 9.0, 3.0, -1
    for prompt in (late, soon, urgent):
        bench.phase.add(prompt)
    assert bench.phase.first is urgent
    order = [bench.step()[0][0] for _ in range(4)]
    assert order == [urgent, soon, late, never]


def test_who_is_certain_to_be_late_steps_behind_those_who_are_not() -> None:
    bench = Bench()
    hopeless, fine, granted = (bench.add(8) for _ in range(3))
    for prompt, deadline in ((hopeless, 1.0), (fine, 2.0), (granted, 1.0)):
        bench.phase.remove(prompt.attempt)
        prompt.deadline = deadline
        bench.phase.add(prompt)
    bench.phase.grant(granted.attempt, 0.0)
    bench.phase.demote(0.9, lambda prompt: 0.2)
    assert (hopeless.late, hopeless.deadline) == (True, 1.0 + GRACE_S)
    assert not fine.late and not granted.late
    bench.phase.demote(5.0, lambda prompt: 0.2)
    assert hopeless.deadline == 1.0 + GRACE_S  # once: it is not pushed back for ever
    assert [bench.step()[0][0] for _ in range(3)] == [granted, hopeless, fine]
