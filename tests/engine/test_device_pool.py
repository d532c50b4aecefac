"""Pools by reference between devices, with a driver that maps memory of this very process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pdserve.core.errors import HandshakeRefused
from pdserve.core.plan import PoolExport
from pdserve.engine.cuda_driver import HANDLE_BYTES, CudaDriver, DriverError, Opened
from pdserve.engine.device_pool import DeviceExport, MappedDevicePool, tensor_at
from pdserve.kernels.copy_blocks import move_blocks

NUM_BLOCKS, SIZE = 12, 256


class Driver:
    """Handles are numbers of allocations; ``opened`` counts those that are mapped."""

    def __init__(self) -> None:
        self.memory: dict[bytes, Tensor] = {}
        self.opened = 0

    def export(self, pointer: int, device: int) -> tuple[bytes, int]:
        for handle, memory in self.memory.items():
            start = memory.data_ptr()
            if start <= pointer < start + memory.nbytes:
                return handle, pointer - start
        raise DriverError("invalid argument")

    def open(self, handle: bytes, device: int) -> Opened:
        if handle not in self.memory:
            raise DriverError("invalid device context")
        self.opened += 1
        return Opened(self.memory[handle].data_ptr(), self.memory[handle].nbytes, device)

    def close(self, opened: Opened) -> None:
        self.opened -= 1


def begin(
    source: Tensor, target: Tensor, theirs: Sequence[int], ours: Sequence[int]
) -> Callable[[], None]:
    return lambda: move_blocks(source, target, torch.tensor((theirs, ours)))


@pytest.fixture
def driver() -> Driver:
    made = Driver()
    # an allocator hands out pieces: the pool begins somewhere in its allocation
    made.memory[b"x" * HANDLE_BYTES] = torch.zeros(64 + (NUM_BLOCKS + 1) * SIZE, dtype=torch.uint8)
    return made


@pytest.fixture
def theirs(driver: Driver) -> Tensor:
    (memory,) = driver.memory.values()
    return memory[64:].view(NUM_BLOCKS + 1, SIZE)


@pytest.fixture
def export(driver: Driver, theirs: Tensor) -> Iterator[DeviceExport]:
    made = DeviceExport(theirs, driver)
    yield made
    made.close()


def test_a_mapped_pool_is_pulled_from(driver: Driver, theirs: Tensor, export: DeviceExport) -> None:
    theirs[:NUM_BLOCKS] = torch.randint(0, 255, (NUM_BLOCKS, SIZE), dtype=torch.uint8)
    ours = torch.zeros(5, SIZE, dtype=torch.uint8)
    assert export.export.offset == 64 and export.export.num_blocks == NUM_BLOCKS
    mapped = MappedDevicePool(ours, export.export, driver, begin)
    mapped.copy((11, 0, 7), (4, 2, 1))
    assert torch.equal(ours[[4, 2, 1]], theirs[[11, 0, 7]])
    assert not ours[[0, 3]].any()
    offered = mapped.generations.of((11, 0))
    export.generations.bump([0])
    assert not mapped.generations.are((11, 0), offered)
    assert not mapped.owner_gone
    mapped.close()
    assert driver.opened == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: replace(e, handle=b"y" * HANDLE_BYTES), "can't be mapped: invalid device"),
        (lambda e: replace(e, offset=64 + SIZE), "bytes, not its pool"),
        (lambda e: replace(e, offset=0), "can be mapped, but not read"),
        (lambda e: replace(e, nonce=bytes(16)), "not what the peer speaks of"),
    ],
)
def test_what_is_not_the_pool_is_refused(
    change: Callable[[PoolExport], PoolExport], said: str, driver: Driver, export: DeviceExport
) -> None:
    ours = torch.zeros(5, SIZE, dtype=torch.uint8)
    with pytest.raises(HandshakeRefused, match=said):
        MappedDevicePool(ours, change(export.export), driver, begin)
    assert driver.opened == 0


def test_a_tensor_over_foreign_memory() -> None:
    memory = torch.arange(100, dtype=torch.uint8)
    view = tensor_at(memory.data_ptr() + 10, 20, torch.device("cpu"))
    assert view.tolist() == list(range(10, 30))
    view[0] = 99
    assert memory[10] == 99


class Library:
    """``libcuda`` as far as the driver uses it: notes what it is asked, and writes answers."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing = ""
        self.cuIpcOpenMemHandle_v2: Any = _Function(self, "cuIpcOpenMemHandle_v2")

    def __getattr__(self, name: str) -> Any:
        return _Function(self, name)


class _Function:
    def __init__(self, library: Library, name: str) -> None:
        self.library, self.name = library, name
        self.argtypes: Any = None

    def __call__(self, *arguments: Any) -> int:
        self.library.calls.append(self.name)
        answer = [getattr(argument, "_obj", None) for argument in arguments]
        match self.name:
            case "cuMemGetAddressRange_v2":
                answer[0].value, answer[1].value = 0x7000_0000_1000, 1 << 21
            case "cuIpcGetMemHandle":
                assert arguments[1].value == 0x7000_0000_1000  # the base, not the pointer
                ctypes.memmove(ctypes.addressof(answer[0]), b"h" * 64, 64)
            case "cuIpcOpenMemHandle_v2":
                assert self.argtypes is not None and bytes(arguments[1]) == b"h" * 64
                answer[0].value = 0x7000_0000_1000
            case "cuGetErrorString":
                answer[1].value = b"it says no"
                return 0
        return 201 if self.name == self.library.failing else 0


def test_the_driver_is_called_in_the_devices_own_context() -> None:
    library = Library()
    driver = CudaDriver(library)
    assert driver.export(0x7000_0000_1400, 1) == (b"h" * 64, 0x400)
    inside = ["cuMemGetAddressRange_v2", "cuIpcGetMemHandle"]
    before = ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2"]
    after = ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]
    assert library.calls == [*before, *inside, *after]
    library.calls.clear()
    opened = driver.open(b"h" * 64, 1)
    assert opened == Opened(0x7000_0000_1000, 1 << 21, 1)
    driver.close(opened)
    assert "cuIpcCloseMemHandle" in library.calls


def test_what_the_driver_refuses_is_told_and_its_context_is_put_back() -> None:
    library = Library()
    driver = CudaDriver(library)
    with pytest.raises(DriverError, match="a handle of 3 bytes"):
        driver.open(b"abc", 0)
    library.failing = "cuIpcOpenMemHandle_v2"
    with pytest.raises(DriverError, match="cuIpcOpenMemHandle_v2: it says no"):
        driver.open(b"h" * 64, 0)
    assert library.calls[-2:] == ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]
