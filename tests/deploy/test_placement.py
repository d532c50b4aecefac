"""Which worker runs where, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from pdserve.core.config import PoolSection, PoolsSection
from pdserve.core.errors import ConfigError
from pdserve.deploy.devices import Devices, usable_cores
from pdserve.deploy.placement import place


def pools(
    prefill: int = 0, decode: int = 0, mixed: int = 0, on: Mapping[str, str] | None = None
) -> PoolsSection:
    counts = {"prefill": prefill, "decode": decode, "mixed": mixed}
    return PoolsSection(
        **{
            name: PoolSection(workers=count, device=(on or {}).get(name, "auto"))
            for name, count in counts.items()
        }
    )


def placed(wanted: PoolsSection, num_gpus: int) -> dict[str, tuple[str, float]]:
    specs = place(wanted, Devices(num_gpus=num_gpus, num_cores=8))
    return {spec.worker_id: (spec.device, spec.memory_share) for spec in specs}


def test_on_a_cpu_workers_share_memory_and_cores() -> None:
    specs = place(pools(1, 2), Devices(num_gpus=0, num_cores=8))
    assert [spec.worker_id for spec in specs] == ["prefill-0", "decode-0", "decode-1"]
    assert [spec.role for spec in specs] == ["prefill", "decode", "decode"]
    assert {spec.device for spec in specs} == {"cpu"}
    assert [spec.memory_share for spec in specs] == [pytest.approx(1 / 3)] * 3
    assert {spec.num_threads for spec in specs} == {2}


def test_each_worker_has_a_thread() -> None:
    specs = place(pools(4, 4), Devices(num_gpus=0, num_cores=2))
    assert {spec.num_threads for spec in specs} == {1}


def test_prefill_and_decode_lie_on_different_gpus() -> None:
    assert placed(pools(1, 1), 2) == {"prefill-0": ("cuda:0", 1.0), "decode-0": ("cuda:1", 1.0)}
    assert placed(pools(2, 2), 2) == {
        "prefill-0": ("cuda:0", 0.5),
        "prefill-1": ("cuda:0", 0.5),
        "decode-0": ("cuda:1", 0.5),
        "decode-1": ("cuda:1", 0.5),
    }


def test_one_gpu_is_shared() -> None:
    assert placed(pools(1, 1), 1) == {"prefill-0": ("cuda:0", 0.5), "decode-0": ("cuda:0", 0.5)}


def test_more_gpus_than_workers() -> None:
    assert [device for device, _ in placed(pools(1, 2), 8).values()] == [
        "cuda:0",
        "cuda:1",
        "cuda:2",
    ]


def test_free_workers_keep_off_gpus_that_others_were_given() -> None:
    assert placed(pools(1, 2, on={"decode": "cuda", "prefill": "cuda:0"}), 2) == {
        "prefill-0": ("cuda:0", 1.0),
        "decode-0": ("cuda:1", 0.5),
        "decode-1": ("cuda:1", 0.5),
    }
    assert placed(pools(1, 1, on={"prefill": "cuda:0"}), 1) == {
        "prefill-0": ("cuda:0", 0.5),
        "decode-0": ("cuda:0", 0.5),
    }


def test_cpu_workers_beside_gpu_workers() -> None:
    assert placed(pools(2, 1, on={"prefill": "cpu"}), 1) == {
        "prefill-0": ("cpu", 0.5),
        "prefill-1": ("cpu", 0.5),
        "decode-0": ("cuda:0", 1.0),
    }


@pytest.mark.parametrize(
    ("device", "num_gpus", "allowed"),
    [
        ("cuda", 0, r"auto or cpu \(no GPU is usable here\)"),
        ("cuda:1", 1, "auto, cpu, or cuda:0"),
        ("cuda:4", 4, "auto, cpu, or cuda:0 to cuda:3"),
    ],
)
def test_a_gpu_that_is_not_there(device: str, num_gpus: int, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"pools.decode.device: found '{device}'; .*{allowed}$"):
        place(pools(1, 1, on={"decode": device}), Devices(num_gpus=num_gpus, num_cores=1))


def test_an_empty_pool_asks_for_nothing() -> None:
    assert placed(pools(mixed=1, on={"prefill": "cuda:7"}), 0) == {"mixed-0": ("cpu", 1.0)}


def test_cores_of_a_container(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    unbounded = usable_cores(tmp_path / "none")
    assert unbounded >= 1
    for text, cores in [
        ("max 100000", unbounded),
        ("100000 100000", 1),
        ("50000 100000", 1),
        (f"{100000 * (unbounded + 3)} 100000", unbounded),
        ("garbage", unbounded),
    ]:
        quota.write_text(text)
        assert usable_cores(quota) == cores


def test_devices_travel_as_json(tmp_path: Path) -> None:
    devices = Devices(num_gpus=2, num_cores=16)
    devices.save(tmp_path / "devices.json")
    assert Devices.read(tmp_path / "devices.json") == devices
