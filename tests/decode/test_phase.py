from __future__ import annotations

import sequences

from pdserve.cache.kvcache import KvCache
from pdserve.cache.retired import RetiredSequences
from pdserve.cache.sequence import Sequence
from pdserve.decode.finish import FinishRules
from pdserve.decode.phase import DecodePhase, DecodeState, Reservation


class Bench:
    """A decode phase with an engine whose every token is 5."""

    def __init__(self, num_blocks: int = 16, max_batch: int = 4, growth_tokens: int = 0) -> None:
        self.cache = KvCache(num_blocks, 4)
        self.retired = RetiredSequences(self.cache.release)
        rules = FinishRules(frozenset({0}), max_context=4 * num_blocks)
        self.phase = DecodePhase(self.cache, self.retired, rules, max_batch, growth_tokens)
        self.held_prompts: list[Sequence] = []  # droppable
        self.preempted: list[Sequence] = []
        self.inflight: list[list[Sequence]] = []

    def ask(self, num_tokens: int | list[int], max_tokens: int = 100) -> Sequence:
        """Placed, and its peer has begun."""
        seq = sequences.sequence(num_tokens, max_tokens=max_tokens)
        self.phase.expect(seq)
        self.phase.request(seq.attempt)
        return seq

    def run(self, num_tokens: int | list[int], max_tokens: int = 100) -> Sequence:
        """In the running batch, with its first token."""
        seq = self.ask(num_tokens, max_tokens)
        assert self.phase.reserve() is not None
        self.arrive(seq)
        return seq

    def arrive(self, seq: Sequence) -> None:
        self.phase.received(seq.attempt)
        seq.token_ids.append(5)
        self.phase.join(seq)

    def launch(self) -> list[Sequence]:
        rows, preempted = self.phase.schedule(self._make_room)
        self.preempted += preempted
        for seq in rows:
            seq.num_scheduled_tokens += 1
            seq.num_inflight += 1
            seq.num_sampling += 1
        self.inflight.append(rows)
        self.check()
        return rows

    def read(self) -> None:
        for seq in self.inflight.pop(0):
            seq.num_inflight -= 1
            if seq in self.retired:
                self.retired.row_read(seq)
                continue
            seq.num_sampling -= 1
            seq.num_computed_tokens = seq.num_tokens
            self.cache.store(seq)
            seq.token_ids.append(5)
        self.check()

    def step(self) -> list[Sequence]:
        rows = self.launch()
        self.read()
        return rows

    def end(self, seq: Sequence) -> None:
        removed = self.phase.remove(seq.attempt)
        assert removed is seq
        self.retired.add(seq)
        self.check()

    def check(self) -> None:
        self.cache.check([*self.phase, *self.retired, *self.held_prompts])

    def _make_room(self) -> bool:
        if not self.held_prompts:
            return False
        self.cache.release(self.held_prompts.pop())
        return True


def test_a_transfer_reserves_receives_and_runs() -> None:
    bench = Bench()
    seq = sequences.sequence(6)
    bench.phase.expect(seq)
    assert bench.phase.state(seq.attempt) is DecodeState.RESERVING
    assert bench.phase.reserve() is None  # its peer has not begun
    bench.phase.request(seq.attempt)
    reservation = bench.phase.reserve()
    assert reservation == Reservation(seq.attempt, 0, tuple(seq.block_table))
    assert len(seq.block_table) == 2
    assert bench.phase.state(seq.attempt) is DecodeState.RECEIVING
    assert bench.phase.reserve() is None and bench.step() == []
    bench.arrive(seq)
    assert bench.phase.state(seq.attempt) is DecodeState.RUNNING
    assert bench.step() == [seq]
    assert seq.num_computed_tokens == 7 and seq.num_output_tokens == 2
    bench.end(seq)
    assert bench.phase.state(seq.attempt) is None
    assert bench.cache.counts().held == 0 and bench.phase.num_free_places == 4


def test_room_is_given_in_the_order_of_asking() -> None:
    bench = Bench(num_blocks=4)
    first, big, small = bench.ask(8), bench.ask(12), bench.ask(4)
    granted = bench.phase.reserve()
    assert granted is not None and granted.attempt == first.attempt
    assert bench.phase.reserve() is None  # the small one would fit, but it is not its turn
    bench.end(first)
    granted = bench.phase.reserve()
    assert granted is not None and granted.attempt == big.attempt
    granted = bench.phase.reserve()
    assert granted is not None and granted.attempt == small.attempt
    bench.check()


def test_a_place_in_the_batch_is_needed_too() -> None:
    bench = Bench(max_batch=1)
    first = bench.run(4)
    second = bench.ask(4)
    assert bench.phase.num_free_places == 0 and bench.phase.reserve() is None
    bench.end(first)
    assert bench.phase.reserve() is not None
    bench.end(second)


def test_what_is_cached_need_not_be_sent_even_all_of_it() -> None:
    bench = Bench()
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    bench.end(bench.run(text))
    again = bench.ask(text)
    granted = bench.phase.reserve()
    assert granted is not None
    assert granted.first_block == 2 and len(granted.blocks) == 2
    longer = bench.ask([*text, 9])
    granted = bench.phase.reserve()
    assert granted is not None
    assert granted.first_block == 2 and len(granted.blocks) == 3
    assert again.block_table == longer.block_table[:2]
    bench.check()


def test_received_blocks_are_found_by_later_texts_only_once_they_are_in() -> None:
    bench = Bench()
    text = [1, 2, 3, 4, 5]
    first, second = bench.ask(text), bench.ask(text)
    for _ in range(2):
        granted = bench.phase.reserve()
        assert granted is not None and granted.first_block == 0
    bench.arrive(first)
    bench.arrive(second)
    third = bench.ask(text)
    granted = bench.phase.reserve()
    assert granted is not None and granted.first_block == 1
    assert third.block_table[0] == first.block_table[0]
    bench.check()


def test_growth_is_forecast_at_the_door_but_not_for_the_only_one() -> None:
    bench = Bench(num_blocks=8, growth_tokens=8)
    alone = bench.ask(24)
    assert bench.phase.headroom(alone) == 0
    assert bench.phase.reserve() is not None
    bench.arrive(alone)
    other = bench.ask(4)
    # 25 tokens may become 33, whose last needs no KV: 2 blocks more; 4 may become 12: 2 more
    assert bench.phase.headroom(other) == 4
    assert bench.phase.headroom(None) == 2
    assert bench.phase.reserve() is None
    bench.end(alone)
    assert bench.phase.reserve() is not None
    bench.end(other)


def test_an_output_that_is_nearly_done_keeps_no_more_room_than_it_needs() -> None:
    bench = Bench(growth_tokens=100)
    bench.run(4, max_tokens=3)
    # of 3 tokens the last needs no KV: 6 positions in all, a block more than the prompt's
    assert bench.phase.headroom(None) == 1


def test_blocks_are_added_as_they_fill() -> None:
    bench = Bench()
    seq = bench.run(3)
    assert len(seq.block_table) == 1
    bench.step()  # writes position 3, the block's last
    assert len(seq.block_table) == 1
    bench.step()
    assert len(seq.block_table) == 2
    bench.check()


def test_a_row_can_follow_one_that_is_not_read_yet() -> None:
    bench = Bench()
    seq = bench.run(3)
    assert bench.launch() == [seq] and bench.launch() == [seq]
    assert seq.num_scheduled_tokens == 5 and seq.num_tokens == 4
    assert len(seq.block_table) == 2
    bench.read()
    bench.read()
    assert seq.num_tokens == 6
    bench.check()


def test_no_row_goes_past_an_end_by_length() -> None:
    bench = Bench()
    seq = bench.run(3, max_tokens=3)
    assert bench.launch() == [seq] and bench.launch() == [seq]
    assert bench.launch() == []  # the third token is in flight
    for _ in range(3):
        bench.read()
    assert seq.num_output_tokens == 3
    assert bench.launch() == []
    bench.check()


def test_the_youngest_is_preempted_and_the_oldest_never() -> None:
    bench = Bench(num_blocks=3)
    old, middle, young = bench.run(4), bench.run(4), bench.run(4)
    assert bench.step() == [old]  # takes the block of the youngest; the middle gets none
    assert [seq.attempt for seq in bench.preempted] == [young.attempt, middle.attempt]
    assert bench.phase.num_running == 1
    assert bench.phase.num_free_places == 1  # they keep their places
    fresh = bench.preempted[0]
    assert fresh.token_ids == young.token_ids and fresh.block_table == []
    while old.num_tokens < 12:  # to the end of the pool, and of the context
        assert bench.step() == [old]
    assert len(old.block_table) == 3 and bench.step() == []
    bench.check()


def test_prompts_held_for_others_go_before_anybody_is_preempted() -> None:
    bench = Bench(num_blocks=4)
    held = sequences.sequence(8)
    assert bench.cache.claim(held)
    bench.held_prompts.append(held)
    old, young = bench.run(4), bench.run(4)
    assert bench.step() == [old, young]
    assert bench.preempted == [] and bench.held_prompts == []


def test_the_oldest_alone_waits_for_what_else_holds_blocks() -> None:
    bench = Bench(num_blocks=3)
    old = bench.run(4)
    coming = bench.ask(8)
    assert bench.phase.reserve() is not None  # in the middle of its transfer: can't be taken
    assert bench.step() == []
    assert bench.phase.state(old.attempt) is DecodeState.RUNNING and bench.preempted == []
    bench.end(coming)
    assert bench.step() == [old]


def test_blocks_of_rows_in_flight_are_waited_for_not_taken_twice() -> None:
    bench = Bench(num_blocks=3)
    old, middle, young = bench.run(3), bench.run(3), bench.run(3)
    assert bench.launch() == [old, middle, young]
    assert bench.launch() == []  # the youngest is out, and its block still being written
    assert [seq.attempt for seq in bench.preempted] == [young.attempt]
    assert bench.retired.num_returning_blocks == 1
    bench.read()
    assert bench.launch() == [old]
    assert [seq.attempt for seq in bench.preempted] == [young.attempt, middle.attempt]
    bench.read()
    bench.read()
    bench.check()


def test_a_preempted_sequence_comes_back_in_the_order_of_age() -> None:
    bench = Bench(num_blocks=16)
    old, young = sequences.sequence(4), sequences.sequence(4)
    for seq in (young, old):
        assert bench.cache.claim(seq)
        bench.phase.take_place(seq)
        sequences.compute(seq)
        seq.token_ids.append(5)
        bench.phase.join(seq)
    assert bench.step() == [old, young]


def test_where_all_stand_still_the_lowest_id_comes_first() -> None:
    bench = Bench(num_blocks=4)
    asked: list[tuple[int, str]] = []
    blocker = bench.cache.pool.allocate(3)
    assert blocker is not None

    def make_room(num_blocks: int, above: str) -> None:
        asked.append((num_blocks, above))
        bench.cache.pool.release(blocker)

    low, high = sequences.sequence(8, number=1), sequences.sequence(8, number=2)
    for seq in (high, low):
        bench.phase.expect(seq)
        bench.phase.request(seq.attempt)
    assert bench.phase.reserve() is None
    granted = bench.phase.reserve_lowest(make_room)
    assert granted is not None and granted.attempt == low.attempt
    assert asked == [(2, low.attempt.request_id)]
    assert bench.phase.num_reserving == 1
    bench.check()


def test_removal_in_each_state_gives_the_place_back() -> None:
    for state in DecodeState:
        bench = Bench()
        seq = sequences.sequence(4)
        bench.phase.expect(seq)
        if state is not DecodeState.RESERVING:
            bench.phase.request(seq.attempt)
            assert bench.phase.reserve() is not None
        if state is DecodeState.RUNNING:
            bench.arrive(seq)
        assert bench.phase.state(seq.attempt) is state
        bench.end(seq)
        assert bench.phase.num_free_places == 4 and bench.cache.counts().held == 0
        assert bench.phase.remove(seq.attempt) is None


def test_what_the_prefill_phase_recomputes_only_has_a_place_here() -> None:
    bench = Bench(num_blocks=2)
    bench.run(4)
    young = bench.run(4)
    bench.step()
    assert bench.phase.state(young.attempt) is None
    assert bench.phase.remove(young.attempt) is None
    assert bench.phase.num_free_places == 3
