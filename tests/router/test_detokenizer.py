"""Text as it comes: no half characters, nothing lost, nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from pdserve.router.detokenizer import Detokenizer, StopStrings
from pdserve.router.tokenizer import Tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog, the fox",
    "naïve façade, żółć, 東京は夜の七時, 👩‍👩‍👧 and 👍🏽, Ω≈ç√",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }\n\n\t",
]


def byte_level() -> tokenizers.Tokenizer:
    """A small BPE over bytes: every id decodes, whole characters or not."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As of Llama 2: words with a leading mark, and bytes for what is not in the vocabulary."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ("▁", "▁the", "▁fox", "a", "b", "c", "the"):
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()


def decode(token_ids: Sequence[int]) -> str:
    return BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=200))
def test_the_pieces_of_any_tokens_are_the_whole_text(token_ids: list[int]) -> None:
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + detokenizer.flush() == decode(token_ids)


def converted() -> tokenizers.Tokenizer:
    """As out of a GGUF file: the same, with steps before that bytes pass unchanged."""
    tokenizer = byte_level()
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.ByteLevel()])
    return tokenizer


CONVERTED = converted()


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, CONVERTED], ids=["plain", "converted"])
@given(token_ids=st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=200))
def test_tokens_that_are_whole_characters_need_no_others(
    tokenizer: tokenizers.Tokenizer, token_ids: list[int]
) -> None:
    asked: list[int] = []

    def counted(window: Sequence[int]) -> str:
        asked.append(len(window))
        return decode(window)

    detokenizer = Detokenizer(counted, Tokenizer(tokenizer, None).whole)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + detokenizer.flush() == decode(token_ids)
    halves = sum("\N{REPLACEMENT CHARACTER}" in decode([token_id]) for token_id in token_ids)
    assert halves or not sum(asked)


def test_where_a_token_reads_otherwise_by_itself_none_is_taken_for_whole() -> None:
    assert Tokenizer(BYTE_FALLBACK, None).whole is None


@given(st.text(max_size=80))
def test_no_piece_of_a_real_text_has_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(decode)
    byte_ids = [BYTE_LEVEL.token_to_id(letter) for letter in _letters(text)]
    pieces = [detokenizer.push(token_id) for token_id in byte_ids]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert detokenizer.flush() == ""
        assert "".join(pieces) == text
        assert sum(map(bool, pieces)) == len(text)  # each with its last byte, not later


@given(st.text(max_size=80).filter(lambda text: "\N{REPLACEMENT CHARACTER}" not in text))
def test_byte_fallback_gives_whole_characters_too(text: str) -> None:
    token_ids = [byte + 1 for byte in text.encode()]
    detokenizer = Detokenizer(BYTE_FALLBACK.decode)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pieces) + detokenizer.flush() == BYTE_FALLBACK.decode(token_ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(st.lists(st.sampled_from(["▁the", "▁fox", "a", "the", "<0xE6>", "<0x9D>", "<0xB1>"])))
def test_words_keep_their_spaces(words: list[str]) -> None:
    token_ids = [BYTE_FALLBACK.token_to_id(word) for word in words]
    whole = BYTE_FALLBACK.decode(token_ids)
    detokenizer = Detokenizer(BYTE_FALLBACK.decode)
    text = "".join([detokenizer.push(token_id) for token_id in token_ids]) + detokenizer.flush()
    if "\N{REPLACEMENT CHARACTER}" not in whole:  # where bytes are cut short it is lossy
        assert text == whole


def test_endless_rubbish_comes_out_all_the_same() -> None:
    detokenizer = Detokenizer(decode)
    byte = BYTE_LEVEL.token_to_id(_letters_of(b"\x9f"))
    pieces = [detokenizer.push(byte) for _ in range(500)]
    assert len("".join(pieces)) > 400  # though none of it is a character
    assert len("".join(pieces) + detokenizer.flush()) == 500


def test_special_tokens_are_no_text() -> None:
    detokenizer = Detokenizer(decode)
    end = BYTE_LEVEL.token_to_id("<|end|>")
    ids = BYTE_LEVEL.encode("fox").ids
    assert "".join(map(detokenizer.push, [*ids, end, *ids])) + detokenizer.flush() == "foxfox"


def _letters(text: str) -> list[str]:
    return [_letters_of(bytes([byte])) for byte in text.encode()]


def _letters_of(data: bytes) -> str:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    return "".join(letters[byte] for byte in data)


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.text("ab\n", max_size=30), STOPS, st.data())
def test_a_stop_string_ends_the_text_however_it_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    finder = StopStrings(stops)
    out, stopped, rest = "", False, text
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        piece, stopped = finder.push(rest[:size])
        out, rest = out + piece, rest[size:]
        assert out == text[: len(out)]
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        end = min(ends)
        longest = max(len(stop) for stop in stops if text[:end].endswith(stop))
        assert stopped and out == text[: end - longest]
    else:
        assert not stopped and out + finder.flush() == text


@pytest.mark.parametrize(
    ("stop", "pieces", "given_out"),
    [
        ("\n\n", ["a\n", "b\n"], ["a", "\nb"]),
        ("END", ["E", "N", "X"], ["", "", "ENX"]),
        ("END", ["xE", "xEN"], ["x", "Ex"]),
        ("aab", ["a", "a", "a"], ["", "", "a"]),
    ],
)
def test_only_what_may_begin_a_stop_is_held_back(
    stop: str, pieces: list[str], given_out: list[str]
) -> None:
    finder = StopStrings([stop])
    assert [finder.push(piece)[0] for piece in pieces] == given_out
