"""Parts around the engine that need none: cores, environment, launch, placement on pages, gates, metrics."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.helpers import LaunchOwner
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine.cores import split_cores
from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.group import environment
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.page_placement import page_granularity
from vllm_dwdp.patches.engine_liveness import killed
from vllm_dwdp.platform import CPU, CUDA
from vllm_dwdp.prefetch.counters import Counters


@given(st.integers(1, 64), st.integers(2, 16))
def test_cores_are_disjoint_where_there_are_enough(cores: int, ranks: int) -> None:
    lists = split_cores(list(range(cores)), ranks)
    assert len(lists) == ranks
    if cores < ranks:
        assert all(part == list(range(cores)) for part in lists)
    else:
        assert [core for part in lists for core in part] == list(range(cores))
        assert max(map(len, lists)) - min(map(len, lists)) <= 1


@pytest.fixture
def short_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder meanwhile; pytest's may be too long for sockets."""
    with tempfile.TemporaryDirectory(prefix="parts-") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


def test_a_launchs_environment_goes_with_it(monkeypatch: pytest.MonkeyPatch, short_folder: Path) -> None:
    monkeypatch.delenv(environment.IPC_FOLDER, raising=False)
    first, second = LaunchOwner(), LaunchOwner()
    for owner in (first, second):
        environment.sockets_in(make_folder(owner), owner)
    del owner
    assert len(os.listdir(short_folder)) == 2
    del first
    gc.collect()
    assert len(os.listdir(short_folder)) == 1 and os.environ[environment.IPC_FOLDER].startswith(str(short_folder))
    del second
    gc.collect()
    assert os.listdir(short_folder) == [] and environment.IPC_FOLDER not in os.environ


def test_what_the_user_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.IPC_FOLDER, "/mine")
    owner = LaunchOwner()
    assert environment.sockets_in("/tmp/dwdp-launch", owner) == {}
    assert os.environ[environment.IPC_FOLDER] == "/mine"
    assert environment.is_users(environment.IPC_FOLDER) and not environment.is_users("DWDP_NOT_SET")


def test_groups_of_a_launch() -> None:
    launch = DwdpLaunch(DwdpConfig(group_size=2), 6, "/tmp/dwdp-launch", (0,))
    assert [launch.group_of(rank) for rank in (0, 3, 5)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("row", "experts"), [(4096, 1), (8192, 1), (2048, 2), (3072, 4), (6144, 2), (100, 1024)])
def test_boundaries_fall_on_pages(row: int, experts: int) -> None:
    assert page_granularity(row, page=4096) == experts
    assert row * experts % 4096 == 0


def build(view: str, rank: int = 0, ranks: int = 2, **config: object) -> ModelBuild:
    return ModelBuild(DwdpConfig(weight_view=view, **config), rank, ranks, CPU)  # type: ignore[arg-type]


def test_a_boundary_is_moved_by_one_expert_for_pages() -> None:
    placement, on_pages = build("auto")._place(10, (2048, 2048), "layer")
    # 10 experts of half a page over 2 ranks: 5 would end in the middle of a page.
    assert on_pages and [len(share) for share in placement.shares] in ([4, 6], [6, 4])
    placement, on_pages = build("contiguous")._place(10, (2048, 2048), "layer")
    assert not on_pages and [len(share) for share in placement.shares] == [5, 5]
    _, on_pages = build("auto")._place(10, (100, 100), "layer")
    assert not on_pages


def test_in_place_is_refused_with_the_numbers() -> None:
    with pytest.raises(DwdpError, match="have 100 and 100 bytes and end on a page of 4096 only every 1024 experts"):
        build("inplace")._place(10, (100, 100), "layer")


def test_gates_keep_their_place_in_a_compiled_graph() -> None:
    from vllm_dwdp.layers.gates import register_gate

    events: list[str] = []

    class Gate:
        def acquire(self, layer: int, tokens: int) -> None:
            events.append(f"acquire {layer} for {tokens}")

        def release(self, layer: int, tokens: int) -> None:
            events.append(f"release {layer} for {tokens}")

    weights = torch.zeros(4, 4)

    class Fill(Gate):
        def acquire(self, layer: int, tokens: int) -> None:
            super().acquire(layer, tokens)
            weights.fill_(layer)

        def release(self, layer: int, tokens: int) -> None:
            super().release(layer, tokens)
            weights.fill_(-100)

    gate = Fill()
    numbers = [register_gate(gate, layer) for layer in (1, 2)]

    def forward(x: torch.Tensor) -> torch.Tensor:
        for number in numbers:
            x = x + 0
            torch.ops.dwdp.acquire(x, number)
            x = x @ weights
            torch.ops.dwdp.release(x, number)
        return x

    x = torch.ones(2, 4)
    expected = x @ torch.full((4, 4), 1.0) @ torch.full((4, 4), 2.0)
    assert torch.equal(torch.compile(forward, backend="aot_eager", fullgraph=True)(x), expected)
    assert events == [f"{call} {layer} for 2" for layer in (1, 2) for call in ("acquire", "release")]


def test_metrics_grow_by_what_the_counters_grew() -> None:
    import prometheus_client

    from vllm_dwdp.engine.metrics import publish

    zero = {name: 0 for name in Counters.__dataclass_fields__ if name != "view"}
    before = Counters(view="contiguous", **{**zero, "pulled_bytes": 7, "exposed_wait_ns": 10**9, "experts_held": 3})
    after = Counters(view="contiguous", **{**zero, "pulled_bytes": 12, "exposed_wait_ns": 3 * 10**9, "experts_held": 3})
    publish(91, before, None)
    publish(91, after, before)
    value = prometheus_client.REGISTRY.get_sample_value
    assert value("dwdp:pulled_bytes_total", {"engine": "91"}) == 12
    assert value("dwdp:exposed_wait_seconds_total", {"engine": "91"}) == 3
    assert value("dwdp:experts_held", {"engine": "91"}) == 3


def test_the_line_at_stop_tells_both_ways_apart() -> None:
    from vllm_dwdp.engine.rank_pages import summary

    zero = {name: 0 for name in Counters.__dataclass_fields__ if name != "view"}
    counted = {"forwards": 9, "direct_forwards": 4, "layers": 8, "exposed_wait_ns": 2 * 10**6, "on_demand_fetches": 1}
    counted |= {"travel_forwards": 3, "travel_requests": 30, "travel_late": 6, "travel_served": 27}
    line = summary(Counters(view="split", **{**zero, **counted, "pulled_bytes": 3 * 10**6, "direct_bytes": 5 * 10**6}))
    words = [
        "9 forwards (4 direct, 3 travelled)",
        "6 of 30 requests to owners late, 27 served",
        "3.0 MB pulled in 8 layers",
        "5.0 MB read directly",
        "waited 2.0 ms, 1 fetched",
    ]
    assert "\n" not in line and all(word in line for word in words), line


def test_engines_of_ray_launches_are_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dwdp.engine import ray_cluster

    monkeypatch.delenv(ray_cluster.START_METHOD, raising=False)
    launch = LaunchOwner()
    ray_cluster.spawn_engines(launch)
    assert os.environ[ray_cluster.START_METHOD] == "spawn"
    environment.forget_launches()
    assert ray_cluster.START_METHOD not in os.environ

    monkeypatch.setenv(ray_cluster.START_METHOD, "spawn")  # the user's own, or vLLM's on CPU: stays
    ray_cluster.spawn_engines(launch)
    environment.forget_launches()
    assert os.environ[ray_cluster.START_METHOD] == "spawn"

    monkeypatch.setenv(ray_cluster.START_METHOD, "fork")
    with pytest.raises(DwdpError, match=r"=fork does not work with Ray: set it to spawn, or leave dwdp.launcher out"):
        ray_cluster.spawn_engines(launch)


def test_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dwdp.engine.configure import resolve_launcher

    for platform, automatic in ((CPU, "mp"), (CUDA, "uni")):
        assert resolve_launcher("auto", platform) == automatic
        assert [resolve_launcher(name, platform) for name in ("mp", "uni", "ray")] == ["mp", "uni", "ray"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_launcher("auto", CPU) == "mp"
    with pytest.raises(DwdpError, match=r"needs Ray: pip install .* or leave launcher out"):
        resolve_launcher("ray", CPU)


@pytest.mark.parametrize("actor", [None, "a1"])
def test_a_worker_is_in_ray_as_an_actor_only(monkeypatch: pytest.MonkeyPatch, actor: str | None) -> None:
    """A forked engine has the Ray of its program, and so has the worker that it forks."""
    from vllm_dwdp.engine.worker import in_ray

    context = SimpleNamespace(get_actor_id=lambda: actor)
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert in_ray() is (actor is not None)


@pytest.mark.parametrize(
    ("name", "exitcode", "told"),
    [
        ("EngineCore_DP1", -9, "DWDP rank 1 (pid 7) died: its engine was killed by SIGKILL"),
        ("EngineCore_DP12", -200, "DWDP rank 12 (pid 7) died: its engine was killed by signal 200"),
        ("EngineCore_DP1", 1, None),  # has told why
        ("EngineCore_DP1", -15, None),  # was told to end
        ("EngineCore_DP1", None, None),
        ("EngineCore", -9, None),
    ],
)
def test_a_killed_engine_is_named(name: str, exitcode: int | None, told: str | None) -> None:
    others = [SimpleNamespace(name="EngineCore_DP0", exitcode=0, pid=6)]
    assert killed(name, [*others, SimpleNamespace(name=name, exitcode=exitcode, pid=7)]) == told
    assert killed(name, others) is None


def test_counters_are_not_waited_for_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dwdp.engine.offline_client import DwdpSyncClient

    client, until = object.__new__(DwdpSyncClient), time.monotonic() + 10

    def alive(self: DwdpSyncClient) -> None:
        assert time.monotonic() < until

    monkeypatch.setattr(DwdpSyncClient, "ensure_alive", alive)
    launch = DwdpLaunch(DwdpConfig(timeout_s=0.1), 2, "/tmp/dwdp-launch", (0,))
    client.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(dwdp_launch=launch))  # type: ignore[assignment]
    client.core_engines, client.utility_results, client._served = [b"0", b"1"], {}, [3, 4]
    answering = {0}

    def send(self: DwdpSyncClient, engine: int, kind: object, payload: tuple[int, int, str, object]) -> None:
        if engine in answering:
            self.utility_results[payload[1]].set_result([{"rank": engine}])

    monkeypatch.setattr(DwdpSyncClient, "_send_to", send)
    with pytest.raises(DwdpTimeout, match=r"rank 1 \(collective_rpc\) does not answer within 0.1 s: .* raise dwdp"):
        client.dwdp_counters()
    answering.add(1)
    assert client.dwdp_counters() == [{"rank": 0, "requests": 3}, {"rank": 1, "requests": 4}]
