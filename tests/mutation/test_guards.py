"""The list of guards follows the code: each is found where it says, once."""

from __future__ import annotations

import pytest
import sources
from guards import GUARDS, Guard


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_it_stands_where_the_list_says(guard: Guard) -> None:
    guard.taken_out_of((sources.ROOT / guard.file).read_text(encoding="utf-8"))
    assert guard.missed_by
    for test in guard.missed_by:
        assert (sources.ROOT / test.partition("::")[0]).exists()


def test_there_are_no_two_alike() -> None:
    assert len({(guard.file, guard.source) for guard in GUARDS}) == len(GUARDS)
