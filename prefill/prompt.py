"""One prompt in the prefill phase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from typing import TypeAlias

from ..cache.sequence import Sequence
from ..core.ids import Attempt
from ..core.messages import TokenItem


class PromptState(Enum):
    WAITING = auto()  # holds nothing
    COMPUTING = auto()  # holds all its blocks and an engine slot
    HOLDING = auto()  # computed; holds its blocks until the peer has them


class PromptKind(Enum):
    """What becomes of the prompt once it is computed."""

    TRANSFER = auto()  # held for a peer
    LOCAL = auto()  # joins this worker's batch
    RECOMPUTE = auto()  # goes back to this worker's batch, which had no room for it


class Rank(IntEnum):
    """Who goes first; within a rank the lower ``priority``, then the earlier deadline, then the
    older one.

    Above NEW are those that others wait for: a stream that has paused, a peer that has
    set memory aside, a prompt that has given up its blocks for somebody else's progress.
    """

    RECOMPUTE = 0
    GRANTED = 1
    DROPPED = 2
    NEW = 3


Order: TypeAlias = tuple[Rank, int, float, int]


@dataclass(slots=True, eq=False)
class Prompt:
    """``token`` is the first of the output where it was drawn already; ``granted_at`` the
    time (s) at which the peer made room, ``dropped`` whether the blocks were once taken.
    ``deadline`` (s) is when its first token is due; ``late`` that it was certain to miss that
    and has got a later one."""

    seq: Sequence
    kind: PromptKind
    state: PromptState = PromptState.WAITING
    token: TokenItem | None = None
    granted_at: float | None = None
    dropped: bool = False
    deadline: float = math.inf
    priority: int = 0
    late: bool = False

    @property
    def attempt(self) -> Attempt:
        return self.seq.attempt

    @property
    def granted(self) -> bool:
        return self.granted_at is not None

    @property
    def begun(self) -> bool:
        """Whether the peer was told of it: dropped or not, that stays true."""
        return self.dropped or self.state is not PromptState.WAITING

    @property
    def rank(self) -> Rank:
        if self.kind is PromptKind.RECOMPUTE:
            return Rank.RECOMPUTE
        if self.granted:
            return Rank.GRANTED
        return Rank.DROPPED if self.dropped else Rank.NEW

    @property
    def order(self) -> Order:
        return self.rank, self.priority, self.deadline, self.seq.arrival

    @property
    def droppable(self) -> bool:
        """Whether its blocks can be had at once, with nobody but this worker the loser."""
        return (
            self.kind is PromptKind.TRANSFER
            and not self.granted
            and self.state is not PromptState.WAITING
            and self.seq.num_inflight == 0
        )
