"""What the chaos run may excuse, and what it must not."""

from __future__ import annotations

from itertools import islice

import pytest
from judge import Blow, Seen, fault
from plan import HOSTS, ROUTER, WORKERS, Kind, Strike, strikes
from traffic import Outcome


def blow(kind: Kind, *victims: str, began: float = 10.0) -> Blow:
    return Blow(Strike(0, kind, victims, 0.0, 0.0), began, began + 1, began + 5)


def seen(outcome: Outcome, why: str = "", began: float = 12.0, ended: float = 14.0) -> Seen:
    return Seen("short", began, ended, outcome, why)


@pytest.mark.parametrize("outcome", [Outcome.WRONG, Outcome.HUNG])
def test_nothing_excuses_a_wrong_text_or_a_call_without_an_end(outcome: Outcome) -> None:
    blows = [blow(Kind.KILL_ALL, *WORKERS), blow(Kind.ROUTER_KILL, ROUTER)]
    assert fault(seen(outcome), blows) is not None


@pytest.mark.parametrize("outcome", [Outcome.RIGHT, Outcome.HUNG_UP, Outcome.REFUSED])
def test_these_are_always_as_they_must_be(outcome: Outcome) -> None:
    assert fault(seen(outcome), []) is None


def test_only_a_router_that_goes_takes_connections_with_it() -> None:
    cut = seen(Outcome.CUT, "ClientPayloadError")
    assert fault(cut, [blow(Kind.ROUTER_KILL, ROUTER)]) is None
    assert fault(cut, [blow(Kind.DISK, "prefill-0", ROUTER)]) is None
    assert fault(cut, [blow(Kind.ROUTER_STOP, ROUTER)]) is not None
    assert fault(cut, [blow(Kind.KILL_ALL, *WORKERS)]) is not None
    assert fault(cut, []) is not None
    assert fault(cut, [blow(Kind.ROUTER_KILL, ROUTER, began=14.5)]) is not None  # it came later
    assert fault(cut, [blow(Kind.ROUTER_KILL, ROUTER, began=4.0)]) is not None  # all was well again


def test_a_request_may_be_given_up_at_its_third_death_and_no_sooner() -> None:
    lost = seen(Outcome.ERROR, "500 workers_lost")
    one, pair = blow(Kind.KILL, "decode-0"), blow(Kind.KILL_PAIR, "prefill-0", "decode-1")
    assert fault(lost, [one]) is not None
    assert fault(lost, [pair]) is not None
    assert fault(lost, [one, pair]) is None
    assert fault(seen(Outcome.ERROR, "workers_lost"), [blow(Kind.KILL_ALL, *WORKERS)]) is None
    pair_cut, router_cut = blow(Kind.CUT, "prefill", "decode"), blow(Kind.CUT, "front", "decode")
    assert fault(lost, [pair_cut]) is not None
    assert fault(lost, [pair_cut, router_cut]) is None


def test_a_cut_takes_no_connection_of_a_client_with_it() -> None:
    assert fault(seen(Outcome.CUT), [blow(Kind.CUT, "front", "decode")]) is not None


@pytest.mark.parametrize("code", ["internal_error", "timeout", "queue_full", "no_workers", "None"])
def test_no_fault_excuses_any_other_error(code: str) -> None:
    blows = [blow(Kind.KILL_ALL, *WORKERS), blow(Kind.ROUTER_TERM, ROUTER)]
    assert fault(seen(Outcome.ERROR, f"503 {code}"), blows) is not None


def test_a_router_that_ends_in_order_says_so() -> None:
    draining = seen(Outcome.ERROR, "503 draining")
    assert fault(draining, [blow(Kind.ROUTER_TERM, ROUTER)]) is None
    assert fault(draining, [blow(Kind.KILL, "decode-0")]) is not None


def test_a_seed_is_a_plan_and_a_round_has_each_kind_once() -> None:
    kinds = list(Kind)
    plan = list(islice(strikes(7, kinds), 3 * len(kinds)))
    assert plan == list(islice(strikes(7, kinds), 3 * len(kinds)))
    assert plan != list(islice(strikes(8, kinds), 3 * len(kinds)))
    for start in range(0, len(plan), len(kinds)):
        assert {strike.kind for strike in plan[start : start + len(kinds)]} == set(kinds)
    assert [strike.number for strike in plan] == list(range(len(plan)))
    assert all(set(strike.victims) <= {*WORKERS, *HOSTS, ROUTER} for strike in plan)
