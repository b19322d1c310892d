"""Every resource of the system that ranks take, at its limit: it works, or one line names the limit that stands in the way.

Limits are set in a process of its own, which can only lower them.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.helpers import LIMIT_S, PAGE, LaunchOwner
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group import environment
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.transport import limits, memfd
from vllm_dwdp.transport.shm import ShmTransport

ROOT = Path(__file__).parents[2]

HEAD = """
import os, resource
from resource import RLIMIT_AS, RLIMIT_FSIZE, RLIMIT_NOFILE, RLIMIT_NPROC
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.transport.limits import require_descriptors
from vllm_dwdp.transport.shm import ShmTransport, SlabRun

def limit(what, soft, hard=None):
    resource.setrlimit(what, (soft, soft if hard is None else hard))

def in_use():
    return len(os.listdir("/proc/self/fd")) - 1

def told(action, *arguments):
    try:
        action(*arguments)
    except DwdpError as error:
        print(error)
    else:
        print("nothing was refused")

transport = ShmTransport()
"""


def said(code: str) -> str:
    """What `code` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code], capture_output=True, timeout=LIMIT_S, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_descriptors_a_soft_limit_is_raised() -> None:
    code = "limit(RLIMIT_NOFILE, in_use() + 3, in_use() + 100)\n"
    code += "slabs = [transport.allocate_slab(4096) for _ in range(64)]\n"
    code += "peers = [transport.map_peer(transport.export_handle(slab)) for slab in slabs]\n"
    code += "whole = transport.map_runs([SlabRun(slab, 0, i * 4096, 4096) for i, slab in enumerate(slabs[:20])])\n"
    assert said(code + "print(len(peers), whole.nbytes)") == f"64 {20 * PAGE}"


@pytest.mark.parametrize(("hard", "left"), [(1000, 20), (70, 6)])
def test_descriptors_that_were_left_stay_for_others(hard: int, left: int) -> None:
    code = f"limit(RLIMIT_NOFILE, in_use() + 20, in_use() + {hard})\nrequire_descriptors(64, 'slabs')\n"
    assert said(code + "print(resource.getrlimit(RLIMIT_NOFILE)[0] - in_use() - 64)") == str(left)


@pytest.mark.parametrize("before", ["", "transport.allocate_slab(4096)\n"], ids=["cold", "hot"])
def test_descriptors_a_hard_limit_is_named(before: str) -> None:
    code = before + "limit(RLIMIT_NOFILE, in_use() + 10)\n"
    code += "told(lambda: [transport.allocate_slab(4096) for _ in range(64)])"
    line = said(code)
    assert "\n" not in line and "a slab needs 4 more file descriptors" in line and "raise the hard limit" in line


def test_descriptors_that_are_all_taken_are_not_called_something_else() -> None:
    code = (
        "slab = transport.allocate_slab(4096)\nhandle = transport.export_handle(slab)\nlimit(RLIMIT_NOFILE, in_use())\n"
    )
    code += "told(transport.allocate_slab, 4096)\ntold(transport.map_peer, handle)\n"
    code += "told(transport.map_runs, [SlabRun(slab, 0, 0, 4096)])"
    lines = said(code).splitlines()
    assert len(lines) == 3 and all("more file descriptors" in line for line in lines), lines


def test_descriptors_of_a_model_are_counted_before_its_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dwdp.layers import coverage

    asked: list[int] = []
    monkeypatch.setattr(coverage, "require_descriptors", lambda count, purpose: asked.append(count))
    module = SimpleNamespace(parameters=lambda: [SimpleNamespace(nbytes=8)])
    layer = SimpleNamespace(module=module, on_pages=False, placement=SimpleNamespace(num_experts=2, shares=[[0], [1]]))
    config = SimpleNamespace(weight_view="auto", num_slots=2)
    build = SimpleNamespace(
        layers=[layer] * 64,
        config=config,
        rank=0,
        group_size=2,
        loading=2,
        reading=2,
        apart=None,
        expects_pages=False,
        built=lambda layer: (0,),
    )
    coverage.check_memory(build)  # type: ignore[arg-type]
    assert len(asked) == 1 and 66 < asked[0] < 100


def test_what_cannot_be_read_for_want_of_descriptors_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_text", full)
    with pytest.raises(DwdpError, match=r"meminfo cannot be read \(Too many open files\): raise"):
        limits.available_memory(tmp_path)
    memfd.this_host.cache_clear()
    with pytest.raises(DwdpError, match=r"Too many open files\): raise ulimit -n$"):
        memfd.this_host()


def test_memory_files_can_never_be_made_executable(transport: ShmTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    def seals() -> int:
        fd = memfd._new_file("dwdp-test")
        try:
            return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        finally:
            os.close(fd)

    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release >= (6, 3):
        assert seals() & 0x20  # F_SEAL_EXEC: what vm.memfd_noexec=2 asks for
    create = os.memfd_create

    def older(name: str, flags: int) -> int:
        if flags & 8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    assert transport.allocate_slab(PAGE).nbytes == PAGE


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "vm.memfd_noexec"),
        (errno.ENOSYS, "memfd_create, which this kernel"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOSPC, "free memory"),
    ],
)
def test_a_file_that_cannot_be_made_is_one_line(
    transport: ShmTransport, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(DwdpError, match=remedy):
        transport.allocate_slab(PAGE)


def test_file_size() -> None:
    line = said("limit(RLIMIT_FSIZE, 1 << 20)\ntold(transport.allocate_slab, 2 << 20)")
    assert "File too large" in line and line.endswith("raise ulimit -f")


def test_address_space() -> None:
    code = "slab = transport.allocate_slab(4096)\n"
    code += "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
    code += "limit(RLIMIT_AS, size + (64 << 20))\n"
    line = said(code + "told(transport.allocate_slot, 256 << 20)\ntold(transport.allocate_slab, 256 << 20)")
    assert line.count("raise ulimit -v") == 2, line


def test_maps_that_run_out_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "self/maps").write_text("a map\n" * 20)
    (tmp_path / "sys/vm/max_map_count").write_text("20\n")
    assert limits.why_no_map(1, tmp_path) == "this process has 20 mappings: raise vm.max_map_count, which is 20"
    (tmp_path / "sys/vm/max_map_count").write_text("2000\n")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)
    assert "overcommit" in limits.why_no_map(1, tmp_path)


def test_threads() -> None:
    # A superuser has no limit of processes.
    code = "if os.getuid() == 0:\n    os.setgroups([])\n    os.setgid(65534)\n    os.setuid(65534)\n"
    line = said(code + "limit(RLIMIT_NPROC, 0)\ntold(transport.copy_engine)")
    assert "the copy thread cannot be started" in line and "ulimit -u" in line


def test_a_running_rank_takes_nothing_more() -> None:
    """Limits that are reached after the start stop no forward."""
    code = """
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.base import Copy
slabs = [transport.allocate_slab(1 << 20) for _ in range(4)]
slots = [transport.allocate_slot(1 << 20) for _ in range(2)]
engine = transport.copy_engine()
ring = Ring(4, 2)
programs = [
    engine.bind([Copy(slots[ring.slot_of(i)].address, slab.address, 1 << 20)]) for i, slab in enumerate(slabs)
]
counters = CounterPage.create()
prefetcher = Prefetcher(ring, engine, programs, counters, 10.0)
prefetcher.start()
for layer in range(4):
    prefetcher.acquire(layer)
    prefetcher.release(layer)
size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
limit(RLIMIT_AS, size + (512 << 10))  # Python's own small objects
limit(RLIMIT_FSIZE, 0)
limit(RLIMIT_NOFILE, in_use())
for _ in range(100):
    for layer in range(4):
        prefetcher.acquire(layer)
        prefetcher.release(layer)
print(counters.snapshot().layers)
prefetcher.close(10.0)
engine.close(10.0)
transport.close()
"""
    assert said(code) == "404"  # 101 forwards of 4 layers


# The folder for socket files


@pytest.mark.parametrize("length", [20, 56, 57, 70, 80, 120])
def test_paths_of_sockets_fit(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    with tempfile.TemporaryDirectory(prefix="d", dir="/tmp") as short:
        place = short + "/" + "x" * (length - len(short) - 1)
        os.mkdir(place)
        monkeypatch.setattr(tempfile, "tempdir", place)
        monkeypatch.delenv(environment.IPC_FOLDER, raising=False)
        owner = LaunchOwner()
        folder = make_folder(owner)
        assert environment.sockets_in(folder, owner) == {environment.IPC_FOLDER: folder}
        assert os.environ[environment.IPC_FOLDER] == folder
        assert folder.startswith(place) == (length <= 56)
        assert os.stat(folder).st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path := get_open_zmq_ipc_path().removeprefix("ipc://"))
        os.unlink(path)
        del owner
        gc.collect()
        assert not os.path.exists(folder)


def test_a_full_temporary_folder_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def full(prefix: str, dir: str) -> str:
        asked.append(dir)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", "/mine")
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "mkdtemp", full)
        with pytest.raises(DwdpError, match="No space left on device"):
            make_folder(LaunchOwner())
    assert asked == ["/mine", "/tmp", "/var/tmp", "/dev/shm"]
    owner = LaunchOwner()
    assert make_folder(owner).startswith("/tmp/")  # "/mine" is not there


def test_vllms_own_place_for_sockets_stays_where_ours_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.IPC_FOLDER, raising=False)
    owner = LaunchOwner()
    assert environment.sockets_in("/" + 100 * "x", owner) == {}
    assert environment.IPC_FOLDER not in os.environ
