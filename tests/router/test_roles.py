"""Roles at run time: who moves, what workers are told, and who may ask for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from router_net import run, split, until

from pdserve.core.errors import RequestError
from pdserve.core.ids import Role
from pdserve.router.roles import Holder, Move, moves

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        ({"a": P, "b": D}, {P: 1, D: 1}, []),
        ({"a": P, "b": D}, {M: 2}, [("a", P, M), ("b", D, M)]),
        ({"a": P, "b": P, "c": D}, {P: 1, D: 2}, [("b", P, D)]),  # a has a request
        ({"a": M, "b": M, "c": M}, {P: 1, D: 1, M: 1}, [("b", M, P), ("c", M, D)]),
        ({"a": P, "b": D, "c": M}, {P: 3}, [("b", D, P), ("c", M, P)]),
    ],
)
def test_the_fewest_and_least_busy_move(
    there: dict[str, Role], wanted: dict[Role, int], expected: list[tuple[str, Role, Role]]
) -> None:
    holders = [Holder(name, role, int(name == "a")) for name, role in there.items()]
    found = moves(holders, wanted)
    assert sorted(found, key=lambda move: move.worker_id) == [Move(*one) for one in expected]


def test_workers_go_back_to_where_they_were_started() -> None:
    holders = [Holder("a", M, 0, D), Holder("b", M, 1, P), Holder("c", M, 2, D)]
    assert moves(holders, {P: 1, D: 2}) == [Move("b", M, P), Move("a", M, D), Move("c", M, D)]


def test_another_number_of_workers_is_refused_in_words() -> None:
    with pytest.raises(RequestError, match="there are 1 workers, and 2 roles"):
        moves([Holder("a", P)], {P: 1, D: 1})


def test_only_who_reads_the_run_folder_may_ask() -> None:
    async def main() -> None:
        async with split() as (up, prefill, decode):
            token = json.loads((up.run_dir / "http.json").read_text())["token"]

            async def post(body: Any, token: str) -> tuple[int, Any]:
                headers = {"Authorization": f"Bearer {token}"}
                async with up.client.post("/admin/roles", json=body, headers=headers) as response:
                    return response.status, await response.json()

            status, answer = await post({"mixed": 2}, "guess")
            assert status == 401 and "run folder" in answer["error"]["message"]
            assert (await post({"mixed": 3}, token))[0] == 400
            status, answer = await post({"mixed": 2, "writers": 1}, token)
            assert status == 400 and "writers" in answer["error"]["message"]
            assert prefill.role_set is None
            status, answer = await post({"mixed": 2}, token)
            assert (status, len(answer["moves"])) == (200, 2)
            await until(lambda: prefill.role_set is decode.role_set is M)
            workers = (await up.get("/cluster"))[1]["workers"]
            assert {one["wanted_role"] for one in workers} == {"mixed"}

    run(main())
