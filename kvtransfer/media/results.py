"""What the threads that copy have to say to the I/O thread: a queue with a descriptor."""

from __future__ import annotations

import os
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Results(Generic[T]):
    """Any thread puts; the I/O thread polls ``fileno`` and takes. There are no more results
    than jobs, so nobody needs to be held up."""

    def __init__(self) -> None:
        self._found: deque[T | BaseException] = deque()
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._waker

    def put(self, result: T | BaseException) -> None:
        self._found.append(result)
        os.eventfd_write(self._waker, 1)

    def take(self) -> list[T]:
        """Raises what a thread has failed with."""
        try:
            os.eventfd_read(self._waker)
        except BlockingIOError:
            return []
        results: list[T] = []
        while self._found:
            result = self._found.popleft()
            if isinstance(result, BaseException):
                raise result
            results.append(result)
        return results

    def close(self) -> None:
        """No thread puts any more. Once closed, the number may be another descriptor's."""
        if self._waker >= 0:
            os.close(self._waker)
            self._waker = -1
