"""What a launch leaves to which process: its environment, cores, names of profiles, how programs end."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.utils.cpu_resource_utils import LogicalCPUInfo

from tests.unit.helpers import LaunchOwner
from tests.unit.leftovers import build
from vllm_dwdp.engine import cores, orphans
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group import environment
from vllm_dwdp.group.launch import RENDEZVOUS_ENV, launch_of

REPO = Path(__file__).resolve().parents[2]
BIND = "VLLM_CPU_OMP_THREADS_BIND"


def names_of_a_child() -> set[str]:
    """What a program that is started now finds of vLLM and of us."""
    code = (
        "import json, os; print(json.dumps([name for name in os.environ if name.startswith(('VLLM', 'DWDP', 'RAY'))]))"
    )
    return set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout))


class Managed(Exception):
    """Ends the start of engines where they would be started."""


def test_other_children_get_nothing_of_a_launch(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.utils import CoreEngineProcManager

    monkeypatch.delenv(BIND, raising=False)
    # vLLM sets some itself.
    build(tiny_moe, distributed_executor_backend=None, data_parallel_size=1)
    before = names_of_a_child()
    config = build(tiny_moe)
    launch = launch_of(config)
    assert launch is not None
    folder = os.environ[environment.IPC_FOLDER]
    # Engines get it whenever they start their workers.
    assert launch.environment[environment.IPC_FOLDER] == folder and launch.environment[BIND].count("|") == 1
    assert BIND not in os.environ
    while_started: list[set[str]] = []

    def processes(**_: Any) -> None:
        while_started.append(names_of_a_child())
        raise Managed

    monkeypatch.setattr("vllm.v1.engine.utils.get_mp_context", lambda: SimpleNamespace(Process=processes))
    with pytest.raises(Managed):
        CoreEngineProcManager(
            local_engine_count=2,
            start_index=0,
            local_start_index=0,
            vllm_config=config,
            local_client=True,
            handshake_address="",
            executor_class=object,  # type: ignore[arg-type]
            log_stats=False,
        )
    assert while_started == [before | {environment.IPC_FOLDER, RENDEZVOUS_ENV}]
    # From here on engines and the coordinator run; the address stays for API servers, who alone take it.
    assert names_of_a_child() == before | {RENDEZVOUS_ENV}
    assert environment.of_parent(RENDEZVOUS_ENV, os.getpid()) and not environment.of_parent(
        RENDEZVOUS_ENV, os.getppid()
    )
    assert os.path.isdir(folder)
    del config, launch
    gc.collect()
    assert names_of_a_child() == before and not os.path.exists(folder)


def test_the_start_of_one_launch_keeps_the_environment_of_another() -> None:
    first, second = LaunchOwner(), LaunchOwner()
    environment.set_for_start(first, "DWDP_TEST", "first")
    environment.set_for_start(second, "DWDP_TEST", "second")
    environment.started(first)
    assert os.environ["DWDP_TEST"] == "second"
    environment.started(second)
    assert "DWDP_TEST" not in os.environ


def test_an_api_server_of_another_launch_is_refused(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dwdp.config import DwdpConfig
    from vllm_dwdp.engine.configure import _launch

    server: Any = SimpleNamespace(data_parallel_size=2, _api_process_count=2, _api_process_rank=1)
    monkeypatch.setenv(RENDEZVOUS_ENV, "1:/tmp/dwdp-launch")
    for parent in (None, 2):
        monkeypatch.setattr(orphans, "started_by", lambda parent=parent: parent)
        with pytest.raises(DwdpError, match="not started by the front end of a dwdp launch"):
            _launch(server, DwdpConfig(), None)  # type: ignore[arg-type]
    monkeypatch.setattr(orphans, "started_by", lambda: 1)
    assert _launch(server, DwdpConfig(), None).folder == "/tmp/dwdp-launch"  # type: ignore[arg-type]


def test_cores_that_the_user_reserves_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BIND, raising=False)
    machine = [LogicalCPUInfo(id=i, physical_core=i % 8, numa_node=i % 8 // 4) for i in range(16)]
    monkeypatch.setattr("vllm.utils.cpu_resource_utils.get_allowed_cpu_list", lambda: machine)
    monkeypatch.setattr("vllm.utils.cpu_resource_utils.get_memory_affinity", lambda: [0, 1])
    assert cores.bind_ranks(2) == {BIND: "8,9,10,11|12,13,14,15"}
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
    assert cores.bind_ranks(2) == {BIND: "8,9,10|12,13,14"}
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "4")  # none would be left: as vLLM, with a warning
    assert cores.bind_ranks(2) == {BIND: "8,9,10,11|12,13,14,15"}
    monkeypatch.delenv("VLLM_CPU_NUM_OF_RESERVED_CPU")
    monkeypatch.setenv("CPU_VISIBLE_MEMORY_NODES", "1")
    assert cores.bind_ranks(2) == {BIND: "12,13|14,15"}
    assert cores.bind_ranks(2, [1]) == {BIND: "14,15"}  # the other rank is a server of its own
    assert cores.bind_ranks(2, [3]) == {BIND: "14,15"}  # an extra one
    # vLLM refuses it beside a list of cores; it asks for what the list gives.
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
    assert cores.bind_ranks(2) == {BIND: "8,9,10,11|12,13,14,15", "VLLM_CPU_SIM_MULTI_NUMA": "0"}
    monkeypatch.setenv(BIND, "nobind")
    assert cores.bind_ranks(2) == {}


def test_temporary_files_go_into_the_launchs_folder(tmp_path: Path) -> None:
    import tempfile

    before = tempfile.gettempdir()
    with environment.temporary_files_in(str(tmp_path)):
        assert tempfile.gettempdir() == str(tmp_path)
    assert tempfile.gettempdir() == before
    with environment.temporary_files_in(str(tmp_path / "gone")):
        assert tempfile.gettempdir() == before


def test_only_the_file_store_of_a_worker_in_its_engine_goes_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading may fix where compiled code is cached (torch's `cache_dir`), which is to outlive the launch."""
    import tempfile

    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from vllm_dwdp.engine import executor

    where: list[str] = []
    monkeypatch.setattr(executor, "end_with_parent", lambda: None)
    monkeypatch.setattr(UniProcExecutor, "_init_executor", lambda self: where.append(tempfile.gettempdir()))
    monkeypatch.setenv(RENDEZVOUS_ENV, "")
    uni: Any = executor.DwdpUniExecutor.__new__(executor.DwdpUniExecutor)
    launch = SimpleNamespace(folder=str(tmp_path), environment={})
    uni.vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(dwdp_launch=launch),
        device_config=SimpleNamespace(device="cpu"),
    )
    uni._init_executor()
    assert where == [tempfile.gettempdir()] and where != [str(tmp_path)]
    assert uni._distributed_args()[0].startswith(f"file://{tmp_path}/")


def test_profiles_are_named_by_rank() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    from vllm_dwdp.engine.worker import DwdpWorkerMixin

    class Worker(CPUWorker):
        def profile(self, *args: Any, **bounds: Any) -> None:
            asked.append((*args, bounds))

    class Ours(DwdpWorkerMixin, Worker):
        def __init__(self, rank: int) -> None:
            self.dwdp_rank = rank

    asked: list[Any] = []
    Ours(0).profile()
    Ours(1).profile(True, "mine", max_iterations=3)
    assert asked == [(True, "dwdp0", {}), (True, "mine_dwdp1", {"max_iterations": 3})]


#: A program that ends while the front end's thread looks for its ranks, again and again.
ENDING = """
import time
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import rank_pages
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.group.launch_folder import make_folder
class Owner: pass
class Config(Owner): pass
rank_pages.PERIOD_S = 0
config = Config()
launch = DwdpLaunch(DwdpConfig(), 2, make_folder(config), ())
rank_pages.watch_ranks(config, launch, publishing=False, summarise=True)
time.sleep(0.5)
"""


def test_a_program_ends_with_its_own_status_while_the_front_end_looks_for_its_ranks() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_end_of_a_program_is_no_failure_of_its_engines() -> None:
    """vLLM's own finalizers end the engines before its monitor knows that they were told to, in 9 of 10 programs."""
    command = [sys.executable, "-m", "tests.unit.client_ends", "5"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
    assert done.stdout.count("ended with 0") == 5, done.stderr[-4000:]
    assert "exited unexpectedly" not in done.stdout + done.stderr
