"""What a worker tells of its cache: the names of its blocks as they come and go, in bounded
messages with a number each."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.messages import MAX_NAMES, CacheEvents
from .pool import BlockPool


class CacheReport:
    """Silent until the first ``everything``: before that nobody knows how names are keyed."""

    def __init__(self, pool: BlockPool, max_names: int = MAX_NAMES) -> None:
        self._pool = pool
        self._max_names = max_names
        self._number = 0
        self._begun = False

    def news(self) -> list[CacheEvents]:
        """What has changed since the last call; nothing where nothing has."""
        changes = self._pool.take_changes()
        if not self._begun or not changes:
            return []
        return self._messages(
            [name for name, there in changes.items() if there],
            [name for name, there in changes.items() if not there],
        )

    def everything(self) -> list[CacheEvents]:
        """All names, for one that knows none."""
        self._begun = True
        self._pool.take_changes()
        return self._messages(self._pool.names(), (), reset=True)

    def _messages(
        self, stored: Sequence[bytes], evicted: Sequence[bytes], *, reset: bool = False
    ) -> list[CacheEvents]:
        messages = []
        size = self._max_names
        for start in range(0, max(len(stored), len(evicted), 1), size):
            messages.append(
                CacheEvents(
                    self._number,
                    b"".join(stored[start : start + size]),
                    b"".join(evicted[start : start + size]),
                    reset and start == 0,
                )
            )
            self._number += 1
        return messages
