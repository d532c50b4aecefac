"""Prompts of known length, made of words, the same in every run."""

from __future__ import annotations

import random

_WORDS = """
the river and a small boat went down to town while old people told stories about rain
mountains birds kept singing before winter came over green fields where children play
music every evening because light was warm many letters arrive from distant cities
""".split()  # noqa: SIM905


def prose(num_words: int, seed: int) -> str:
    """Sentences of 5 to 12 words, about as many tokens as words."""
    draw = random.Random(seed)
    words: list[str] = []
    while len(words) < num_words:
        sentence = draw.sample(_WORDS, draw.randint(5, 12))
        sentence[0] = sentence[0].capitalize()
        sentence[-1] += "."
        words += sentence
    return " ".join(words[:num_words])
