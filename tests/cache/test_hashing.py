from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.cache.hashing import BlockHasher
from pdserve.core.messages import HASH_BYTES

TEXTS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def names(text: list[int], salt: bytes = b"salt", block_size: int = 4) -> list[bytes]:
    hashes: list[bytes] = []
    BlockHasher(block_size, salt).extend(hashes, text, len(text) // block_size)
    return hashes


@settings(derandomize=True)
@given(TEXTS, TEXTS)
def test_names_agree_exactly_as_far_as_the_texts_do(a: list[int], b: list[int]) -> None:
    for block, (left, right) in enumerate(zip(names(a), names(b), strict=False)):
        end = 4 * (block + 1)
        assert (left == right) == (a[:end] == b[:end])


@settings(derandomize=True)
@given(TEXTS, st.integers(0, 10))
def test_a_chain_can_be_extended_piece_by_piece(text: list[int], first: int) -> None:
    hasher = BlockHasher(4, b"salt")
    hashes: list[bytes] = []
    num_blocks = len(text) // 4
    hasher.extend(hashes, text[: 4 * min(first, num_blocks)], min(first, num_blocks))
    hasher.extend(hashes, text, num_blocks)
    assert hashes == names(text)


def test_a_block_is_named_by_all_that_comes_before_it() -> None:
    assert names([1, 2, 3, 4, 9, 9, 9, 9])[1] != names([1, 2, 3, 5, 9, 9, 9, 9])[1]


def test_the_salt_is_part_of_every_name() -> None:
    text = list(range(8))
    assert not set(names(text, b"one")) & set(names(text, b"two"))
    assert names(text, b"x" * 1000) != names(text, b"x" * 999)


def test_names_are_the_same_on_every_host() -> None:
    (name,) = names([1, 2, 3, 2**31 - 1])
    assert len(name) == HASH_BYTES
    assert name.hex() == "8d80b7a7b03eabfec4d04c25a8726bd1"
