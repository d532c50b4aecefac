"""What is asked: how long prompts and answers are, and which of them begin alike.

    2048/256                    every prompt and answer the same (fixed:2048/256 says so too)
    uniform:1024-3072/128-384   even between two bounds
    chat code summarise rag     lognormal; ``rag`` puts one of a few documents before a question
    multi-turn                  conversations that grow, with a shared beginning
    mix:2048/256+512/512        one shape after the other, in equal parts of the time, twice
    trace:FILE                  Azure's CSV or Mooncake's JSON lines, shared beginnings included
    conversations:FILE          JSON lines of real ones: {"messages": [{"role", "content"}]} or
                                {"conversations": [{"from", "value"}]}

The medians of ``chat`` and ``code`` are those of the public Azure traces of 2023.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ConfigError
from ...simulation.workload import TRACE_BLOCK, Length, read_trace
from .prompts import Prompt, PromptMaker, estimated

_PHASES_OF_EACH = 2  # of a mix
_THINK_S = 5.0  # mean pause of a multi-turn user

Draw = np.random.Generator


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. ``think_s`` is the pause before it, after the answer to the one before."""

    prompt: Prompt
    num_output: int
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """Requests of one user, each sent once the one before is answered; most have one."""

    at: float
    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    num_input: int
    num_output: int


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Medians and sigmas (of the logarithm), in tokens."""

    num_input: float
    input_sigma: float
    num_output: float
    output_sigma: float

    def draw(self, draw: Draw) -> Shape:
        return Shape(
            max(1, round(draw.lognormal(math.log(self.num_input), self.input_sigma))),
            max(1, round(draw.lognormal(math.log(self.num_output), self.output_sigma))),
        )


@dataclass(frozen=True, slots=True)
class Preset:
    lengths: Lognormal
    documents: int = 0  # of them one is put before each prompt
    document_tokens: int = 0
    turns: int = 1


PRESETS = {
    "chat": Preset(Lognormal(1020, 0.8, 129, 0.9)),
    "code": Preset(Lognormal(1469, 0.9, 13, 1.1)),
    "summarise": Preset(Lognormal(4096, 0.5, 128, 0.4)),
    "rag": Preset(Lognormal(64, 0.5, 128, 0.5), documents=8, document_tokens=2048),
    "multi-turn": Preset(Lognormal(96, 0.7, 128, 0.5), documents=1, document_tokens=128, turns=4),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """A parsed description. ``times`` of a trace are its own arrivals (s), empty for others."""

    text: str
    sessions: Callable[[Sequence[float], float], list[Session]]
    times: tuple[float, ...] = ()


def parse(text: str, maker: PromptMaker, *, lengths: float = 1.0, context: int = 0) -> Workload:
    """``lengths`` scales all of them; with a ``context`` prompts are cut to fit beside their
    answers. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    if re.fullmatch(r"\d+/\d+", text):
        kind, rest = "fixed", text
    fit = _Fit(lengths, context)
    if kind == "fixed":
        shape = fit(_shape(rest))
        return Workload(text, _plain(maker, lambda draw, part: shape))
    if kind == "uniform":
        low, high = _bounds(rest)
        return Workload(text, _plain(maker, lambda draw, part: fit(_between(draw, low, high))))
    if kind == "mix":
        shapes = [fit(_shape(one)) for one in rest.split("+")]
        order = shapes * _PHASES_OF_EACH
        return Workload(text, _plain(maker, lambda draw, part: order[int(part * len(order))]))
    if kind in PRESETS and not rest:
        return Workload(text, _preset(maker, PRESETS[kind], fit, lengths))
    if kind == "trace":
        rows = read_trace(Path(rest))
        return Workload(text, _trace(maker, rows, fit), tuple(row.time for row in rows))
    if kind == "conversations":
        return Workload(text, _conversations(read_conversations(Path(rest)), fit))
    raise ConfigError(
        f"--workload: found '{text}'; allowed: 2048/256, uniform:LOW-HIGH/LOW-HIGH, mix:A/B+C/D, "
        f"{', '.join(PRESETS)}, trace:FILE, conversations:FILE"
    )


@dataclass(frozen=True, slots=True)
class _Fit:
    """Lengths scaled, then cut to a context."""

    lengths: float
    context: int

    def __call__(self, shape: Shape) -> Shape:
        num_input = max(1, round(shape.num_input * self.lengths))
        num_output = max(1, round(shape.num_output * self.lengths))
        if self.context:
            num_output = min(num_output, max(1, self.context // 2))
            num_input = min(num_input, self.context - num_output)
        return Shape(num_input, num_output)


def _shape(text: str) -> Shape:
    try:
        num_input, num_output = (int(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(f"--workload: found '{text}'; allowed: INPUT/OUTPUT in tokens") from None
    if min(num_input, num_output) < 1:
        raise ConfigError(f"--workload: found '{text}'; allowed: at least 1 token each")
    return Shape(num_input, num_output)


def _bounds(text: str) -> tuple[Shape, Shape]:
    parts = [side.split("-") for side in text.split("/")]
    if [len(side) for side in parts] != [2, 2]:
        raise ConfigError(f"--workload: found '{text}'; allowed: LOW-HIGH/LOW-HIGH")
    low, high = (_shape("/".join(side[end] for side in parts)) for end in (0, 1))
    if low.num_input > high.num_input or low.num_output > high.num_output:
        raise ConfigError(f"--workload: found '{text}'; a lower bound is above its upper one")
    return low, high


def _between(draw: Draw, low: Shape, high: Shape) -> Shape:
    return Shape(
        int(draw.integers(low.num_input, high.num_input + 1)),
        int(draw.integers(low.num_output, high.num_output + 1)),
    )


Make = Callable[[Sequence[float], float], list[Session]]


def _plain(maker: PromptMaker, shape: Callable[[Draw, float], Shape]) -> Make:
    """Requests with nothing in common. ``shape`` is told how far the run is: 0 to 1."""

    def sessions(times: Sequence[float], duration_s: float) -> list[Session]:
        draw = np.random.default_rng([maker.seed, 3])
        made = []
        for index, at in enumerate(times):
            one = shape(draw, min(at / duration_s, 1 - 1e-9) if duration_s else 0.0)
            prompt = maker.piece(one.num_input, 0, index)
            made.append(Session(at, (Ask(prompt, one.num_output),)))
        return made

    return sessions


def _preset(maker: PromptMaker, preset: Preset, fit: _Fit, lengths: float) -> Make:
    size = max(1, round(preset.document_tokens * lengths))

    def sessions(times: Sequence[float], duration_s: float) -> list[Session]:
        draw = np.random.default_rng([maker.seed, 4])
        return [Session(at, tuple(asks(draw, index))) for index, at in enumerate(times)]

    def asks(draw: Draw, index: int) -> Iterator[Ask]:
        history: list[tuple[int, ...] | str] = []
        used = 0
        if preset.documents:
            history.append(maker.piece(size, 1, int(draw.integers(preset.documents))))
            used = size
        for turn in range(preset.turns):
            shape = fit(preset.lengths.draw(draw))
            if fit.context:
                room = fit.context - used - shape.num_output
                if room < 1 and turn:
                    return
                shape = Shape(max(1, min(shape.num_input, room)), shape.num_output)
            history.append(maker.piece(shape.num_input, 2, index, turn))
            think = float(draw.exponential(_THINK_S)) if turn else 0.0
            yield Ask(maker.join(*history), shape.num_output, think)
            # The answer's place is taken by as many tokens that were drawn ahead: so what is
            # asked depends on no answer, and every server is asked the same.
            history.append(maker.piece(shape.num_output, 3, index, turn))
            used += shape.num_input + shape.num_output

    return sessions


def _trace(maker: PromptMaker, rows: Sequence[Length], fit: _Fit) -> Make:
    def sessions(times: Sequence[float], duration_s: float) -> list[Session]:
        made = []
        for index, at in enumerate(times):
            row = rows[index % len(rows)]
            shape = fit(Shape(row.prompt, row.output))
            made.append(Session(at, (Ask(prompt(row, shape, index), shape.num_output),)))
        return made

    def prompt(row: Length, shape: Shape, index: int) -> Prompt:
        pieces = []
        left = shape.num_input
        block = max(1, round(TRACE_BLOCK * fit.lengths))
        for hash_id in row.hash_ids:
            if left < block:
                break
            pieces.append(maker.piece(block, 4, hash_id))
            left -= block
        if left or not pieces:
            pieces.append(maker.piece(max(1, left), 5, index))
        return maker.join(*pieces)

    return sessions


def _conversations(found: Sequence[tuple[Ask, ...]], fit: _Fit) -> Make:
    def fitted(ask: Ask) -> Ask:
        return replace(ask, num_output=fit(Shape(1, ask.num_output)).num_output)

    def sessions(times: Sequence[float], duration_s: float) -> list[Session]:
        return [
            Session(at, tuple(fitted(ask) for ask in found[index % len(found)]))
            for index, at in enumerate(times)
        ]

    return sessions


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_conversations(path: Path) -> list[tuple[Ask, ...]]:
    """Each user's turn becomes a request: all that was said before it, as it was recorded, and
    an answer as long as the recorded one."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            messages = _messages(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{path}: line {number} is no conversation; allowed: "
                '{"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}'
            ) from None
        asks = tuple(
            _recorded(messages, index)
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and index
        )
        if asks:
            found.append(asks)
    if not found:
        raise ConfigError(f"{path}: no conversation with an answer in it")
    return found


def _recorded(messages: Sequence[dict[str, str]], index: int) -> Ask:
    """The request that message ``index`` answered; a pause before it if it is not the first."""
    before = messages[:index]
    think = _THINK_S if any(one["role"] == "assistant" for one in before) else 0.0
    return Ask(tuple(before), estimated(messages[index]["content"]), think)


def _messages(data: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in data:
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in data["messages"]]
    return [
        {"role": _ROLES.get(m["from"], "system"), "content": str(m["value"])}
        for m in data["conversations"]
    ]
