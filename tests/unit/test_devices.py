"""Which GPU a rank gets (engine/devices.py), without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.fake_cuda import Machine
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import devices
from vllm_dwdp.engine.devices import set_devices
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.devices import device_of_rank, devices_needed


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 20))
def test_ranks_fill_one_device_after_the_other(ranks: int, per_device: int, count: int) -> None:
    known = [100 + i for i in range(count)]
    if -(-ranks // per_device) > count:
        with pytest.raises(DwdpError, match=f"{ranks} ranks .* GPUs but {count} are visible"):
            device_of_rank(0, ranks, per_device, known)
        return
    found = [device_of_rank(rank, ranks, per_device, known) for rank in range(ranks)]
    assert len(found) == ranks and found == sorted(found)
    assert max(found.count(device) for device in found) <= per_device


def test_ranks_fill_devices_in_turn() -> None:
    visible = Machine(num_devices=4).infos
    assert [device_of_rank(rank, 4, 1, visible).index for rank in range(4)] == [0, 1, 2, 3]
    assert [device_of_rank(rank, 6, 2, visible).index for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert devices_needed(5, 2) == 3
    with pytest.raises(DwdpError, match=r"8 ranks with .* 1 need 8 GPUs but 4 are visible: .*ranks_per_device to 2"):
        device_of_rank(0, 8, 1, visible)
    with pytest.raises(DwdpError, match=r"need 1 GPUs but 0 are visible: .*use fewer ranks$"):
        device_of_rank(0, 1, 1, ())
    with pytest.raises(DwdpError, match="local rank 2 of 2"):
        device_of_rank(2, 2, 1, visible)
    with pytest.raises(DwdpError, match="both must be >= 1"):
        devices_needed(1, 0)


def config(kv_bytes: int | None, chosen: list[int] | None, nodes: list[int] | None = None) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            assigned_physical_gpu_ids=chosen, numa_bind=nodes is not None, numa_bind_nodes=nodes or None
        ),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=kv_bytes, gpu_memory_utilization=0.9),
    )


def test_ranks_that_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(device_count=lambda: 2, device_id_to_physical_device_id=lambda i: 4 + i)
    monkeypatch.setattr(devices, "current_platform", platform)
    alone = config(None, None)
    set_devices(alone, DwdpConfig(), 2)
    assert alone.parallel_config.assigned_physical_gpu_ids is None and alone.cache_config.gpu_memory_utilization == 0.9
    shared = config(1 << 30, None)
    set_devices(shared, DwdpConfig(ranks_per_device=2), 4)
    assert shared.parallel_config.assigned_physical_gpu_ids == [4, 4, 5, 5]
    assert shared.cache_config.gpu_memory_utilization == 0.45
    chosen = config(1 << 30, [7])
    set_devices(chosen, DwdpConfig(ranks_per_device=3), 3)
    assert chosen.parallel_config.assigned_physical_gpu_ids == [7, 7, 7]
    with pytest.raises(DwdpError, match=r"ranks_per_device is 2.*--kv-cache-memory-bytes"):
        set_devices(config(None, None), DwdpConfig(ranks_per_device=2), 4)
    with pytest.raises(DwdpError, match=r"3 ranks .* need 3 GPUs but 2 are visible"):
        set_devices(config(None, None), DwdpConfig(), 3)


def test_numa_nodes_of_ranks_that_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks a rank's node up by its number, and its own lists have one entry per GPU."""
    monkeypatch.setattr(
        devices,
        "current_platform",
        SimpleNamespace(device_count=lambda: 1, device_id_to_physical_device_id=lambda i: i),
    )
    two = DwdpConfig(ranks_per_device=2)
    set_devices(config(1 << 30, None, nodes=[0, 0]), two, 2)
    for nodes in ([], [0]):
        with pytest.raises(DwdpError, match=r"ranks_per_device is 2: give one node for each of the 2 ranks"):
            set_devices(config(1 << 30, None, nodes=nodes), two, 2)


def test_a_server_of_its_own_takes_its_place_among_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(device_count=lambda: 2, device_id_to_physical_device_id=lambda i: 4 + i)
    monkeypatch.setattr(devices, "current_platform", platform)

    def given(rank: int, ids: list[int] | None, ranks: int = 2, **settings: Any) -> list[int]:
        made = config(1 << 30, ids, nodes=[0])
        set_devices(made, DwdpConfig(group="g", rank=rank, ranks=ranks, **settings), ranks)
        return made.parallel_config.assigned_physical_gpu_ids  # type: ignore[no-any-return]

    assert [given(rank, None) for rank in (0, 1)] == [[4], [5]]
    assert [given(rank, None, 4, ranks_per_device=2) for rank in range(4)] == [[4], [4], [5], [5]]
    assert given(0, [5]) == [5]  # as the user says
    assert [given(rank, [5, 4]) for rank in (0, 1)] == [[5], [4]]
    with pytest.raises(DwdpError, match=r"3 ranks .* need 3 GPUs but 2 are visible"):
        given(0, None, 3)
    # An extra one comes behind those that its group needs.
    assert given(2, [5]) == [5] and [given(rank, None, ranks_per_device=2) for rank in (2, 3)] == [[5], [5]]
    with pytest.raises(
        DwdpError, match=r"rank is 2 of 2, an extra rank, .* GPU number 2 of the 2 visible .*--device-ids"
    ):
        given(2, None)
