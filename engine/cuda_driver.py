"""The few calls of CUDA's driver that map one process's device memory into another.

Straight to ``libcuda``, which is there wherever a GPU is usable: torch's own way of sharing
a tensor keeps reference counts in files of its own, which a killed process leaves behind.
A handle is opened in the context of the device that *reads*: kernels refuse the pointer
else.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class DriverError(Exception):
    """A call that CUDA refused, in its words."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


@dataclass(frozen=True, slots=True)
class Opened:
    """``num_bytes`` of another process's memory from ``base`` on, in ``device``'s context."""

    base: int
    num_bytes: int
    device: int


class CudaDriver:
    """Devices by their numbers as torch counts them. Raises DriverError."""

    def __init__(self, library: Any = None) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1") if library is None else library
        except OSError as error:
            raise DriverError(str(error)) from error
        # the last argument is passed by value: ctypes must know its type
        self._cuda.cuIpcOpenMemHandle_v2.argtypes = (
            ctypes.POINTER(ctypes.c_uint64),
            _Handle,
            ctypes.c_uint,
        )

    def export(self, pointer: int, device: int) -> tuple[bytes, int]:
        """The handle of the allocation that ``pointer`` lies in, and where in it."""
        handle = _Handle()
        with self._context(device):
            base, _ = self._range(pointer)
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
        return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES), pointer - base

    def open(self, handle: bytes, device: int) -> Opened:
        """Maps an allocation of another process, on any GPU that this one reaches."""
        if len(handle) != HANDLE_BYTES:
            raise DriverError(f"a handle of {len(handle)} bytes")
        pointer = ctypes.c_uint64()
        with self._context(device):
            self._call(
                "cuIpcOpenMemHandle_v2",
                ctypes.byref(pointer),
                _Handle.from_buffer_copy(handle),
                _LAZY_PEER_ACCESS,
            )
            base, num_bytes = self._range(pointer.value)
        return Opened(base, num_bytes, device)

    def close(self, opened: Opened) -> None:
        """Unmaps it. No copy from it may be under way."""
        with self._context(opened.device):
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(opened.base))

    def _range(self, pointer: int) -> tuple[int, int]:
        """Where the allocation begins, and its size in bytes."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call(
            "cuMemGetAddressRange_v2",
            ctypes.byref(base),
            ctypes.byref(size),
            ctypes.c_uint64(pointer),
        )
        return base.value, size.value

    @contextlib.contextmanager
    def _context(self, device: int) -> Iterator[None]:
        """The device's primary context, which is torch's, current on this thread."""
        number, context, popped = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(number), device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        try:
            self._call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(popped))
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", number)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            said = text.value.decode() if text.value else f"error {code}"
            raise DriverError(f"{name}: {said}")
