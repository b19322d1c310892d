"""Fixtures of the unit tests."""

import gc
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from tests.unit.helpers import LIMIT_S, LaunchOwner, descriptors, slab_maps
from tests.unit.member import Members, members
from vllm_dwdp.group.launch_folder import make_folder
from vllm_dwdp.transport.shm import ShmTransport

HERE = Path(__file__).parent

# GiB, as the Makefile has it: launches on CPU without a size are refused where the machine is too small for them.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On GPUs, leave out tests that build launches and look for the words of vLLM's CPU platform."""
    built = [item for item in items if Path(item.path).name.startswith("test_bad_") and item.path.parent == HERE]
    if not built:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        reason = "refusals as they read on vLLM's CPU platform; those of GPUs: test_devices, test_graphs, test_split"
        for item in built:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Set aside what is there, such as torch and vLLM: with it each later collection, of which tests make several, takes
    300 ms. Once a module, since some of it is imported by tests."""
    resource_tracker.ensure_running()  # multiprocessing's: it keeps a descriptor from the first spawn on
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def python_is_dispatched_to(request: pytest.FixtureRequest) -> None:
    """Seen once, behind tests with engines: torch's calls of Python modes stayed switched off in this process, and all later
    tests that use one failed. By whom was not found: a warning tells before which module it was so."""
    torch = sys.modules.get("torch")
    if torch is not None and torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python):
        torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.Python, False)
        warnings.warn(f"before {request.node.name} torch's dispatch to Python was switched off", stacklevel=1)


@pytest.fixture(scope="module", autouse=True)
def gates_of_a_module() -> Iterator[None]:
    """The product keeps gates as long as its process, and with them counter pages; here they go with a module's tests."""
    yield
    gates = sys.modules.get("vllm_dwdp.layers.gates")
    if gates is not None and gates._gates:
        gates._gates.clear()
        gc.collect()


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    """vLLM builds models in this process."""
    from tests.unit.whole_model import vllm_groups

    with vllm_groups():
        yield


@pytest.fixture(scope="module")
def hopper() -> Iterator[None]:
    """vLLM builds models in this process, with the kernels that it takes on a Hopper GPU. The last test of the module fails
    where simulated memory stays: later modules count its descriptors."""
    from tests.unit.fake_vmm import open_descriptors
    from tests.unit.hopper import on_hopper
    from tests.unit.whole_model import vllm_groups

    before = open_descriptors()
    with vllm_groups(), on_hopper():
        yield
    gc.collect()
    assert open_descriptors() == before


@pytest.fixture
def no_build_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor its gates: each test has builds of its own. Nor its layers: what vLLM remembers of one for a reload, by a weak
    key, holds it where its experts are quantised while they are read (vLLM strips bound methods, not wrapped ones)."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    from vllm_dwdp.layers import gates
    from vllm_dwdp.layers.build import ModelBuild

    monkeypatch.setattr(ModelBuild, "_current", None)
    yield
    gates._gates.clear()
    LAYERWISE_INFO.clear()
    gc.collect()


@pytest.fixture
def transport() -> Iterator[ShmTransport]:
    """A transport; the test fails if it leaves a descriptor or a mapping behind."""
    gc.collect()
    before = descriptors(), slab_maps()
    made = ShmTransport(timeout_s=LIMIT_S)
    yield made
    made.close()
    made.close()
    gc.collect()
    assert (descriptors(), slab_maps()) == before


@pytest.fixture(scope="session")
def tiny_moe(checkpoint: Callable[..., Path]) -> Path:
    """A Qwen3-MoE folder of one layer and 8 experts."""
    from tests.unit.leftovers import TINY

    return checkpoint(**TINY)


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The test fails if it leaves something on the machine; the environment is put back."""
    from tests.unit import leftovers

    tmp_path_factory.getbasetemp()  # else the first test with a folder makes pytest's own, which would count as left

    variables = dict(os.environ)
    # Not pytest's: a launch puts its sockets elsewhere where their paths would be too long.
    with tempfile.TemporaryDirectory(prefix="left-") as folder, leftovers.nothing_left(Path(folder), monkeypatch):
        yield
    # vLLM sets some of its own while it builds a config.
    os.environ.clear()
    os.environ.update(variables)


#: A front end that makes the folder of a launch, says where, and waits.
FRONT_END = (
    "import sys\nfrom vllm_dwdp.group.launch_folder import make_folder\n"
    "class Owner: pass\nowner = Owner()\nprint(make_folder(owner), flush=True)\nsys.stdin.read()\n"
)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder that every user can enter and write to, as /tmp; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="dwdp-test-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o1777)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture
def group_path(public: Path) -> str:
    """Where a group of servers may meet; nobody has made it."""
    return str(public / "dwdp-group-test")


@pytest.fixture
def two_members(group_path: str) -> Iterator[Members]:
    """A group of two ranks, each in a process of its own once it is started."""
    with members(group_path, 2) as group:
        yield group


@pytest.fixture
def folder() -> Iterator[str]:
    """The folder of a launch whose front end is this process; the test fails where it, or a descriptor, stays."""
    owner = LaunchOwner()
    gc.collect()
    before = descriptors()
    made = make_folder(owner)
    yield made
    del owner
    gc.collect()
    assert not os.path.lexists(made)
    assert descriptors() == before


@pytest.fixture
def front_end(public: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A front end in a process of its own, and its folder."""
    environment = {**os.environ, "TMPDIR": str(public)}
    process = subprocess.Popen(
        [sys.executable, "-c", FRONT_END], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()
