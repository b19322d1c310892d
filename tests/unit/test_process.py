"""Who a process is, whatever it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.helpers import LIMIT_S, LaunchOwner
from vllm_dwdp.group.launch_folder import LaunchFolder, make_folder
from vllm_dwdp.transport import limits

_NAMED = """
import os, sys
from pathlib import Path
Path("/proc/self/comm").write_bytes(bytes.fromhex(sys.argv[1]))
from vllm_dwdp.transport.process import is_gone, process_with, this_process
here = this_process()
print(here.started > 0, process_with(os.getpid()) == here, is_gone(here), is_gone(here._replace(started=1)))
"""


@pytest.mark.parametrize("name", ["эксперты", "a) R 1 (b"])
def test_a_process_is_known_whatever_its_name(name: str) -> None:
    """That of a script which is run by its path is its file's, of which the kernel keeps 15 bytes: here half of a letter."""
    command = [sys.executable, "-c", _NAMED, name.encode()[:15].hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.stdout, done.stderr) == ("True True False True\n", ""), name


def test_limits_are_read_beside_names_of_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "self/maps").write_bytes(b"7f00 r--p /models/\xd0\xff\n" * 20)
    (tmp_path / "sys/vm/max_map_count").write_text("20\n")
    assert limits.why_no_map(1, tmp_path).startswith("this process has 20 mappings")
    (tmp_path / "self/cgroup").write_bytes(b"0::/user-\xff.slice\n")
    (tmp_path / "meminfo").write_text("MemAvailable: 3 kB\n")
    group = tmp_path / os.fsdecode(b"user-\xff.slice")
    group.mkdir()
    (group / "memory.max").write_text("2000\n")
    (group / "memory.current").write_text("500\n")
    assert limits.available_memory(tmp_path, tmp_path).nbytes == 1500


#: Makes the folder of a launch, and is killed: on this machine, or on one with another boot whose namespaces have the same
#: names.
_MAKES = """
import os, signal, sys
from pathlib import Path
read = Path.read_text
def elsewhere(path, *how, **more):
    return "of another machine" if path.name == "boot_id" else read(path, *how, **more)
if sys.argv[1] == "elsewhere":
    Path.read_text = elsewhere
from vllm_dwdp.group.launch_folder import make_folder
class Owner: pass
owner = Owner()
print(make_folder(owner), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_the_folder_of_another_machines_launch_is_left_alone(where: str, public: Path) -> None:
    """Temporary folders may be shared: whose process of that id is none here may be alive there."""
    command, environment = [sys.executable, "-c", _MAKES, where], {**os.environ, "TMPDIR": str(public)}
    path = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment).stdout.strip()
    assert LaunchFolder(path).is_abandoned() == (where == "here")
    owner = LaunchOwner()
    make_folder(owner)
    assert os.path.isdir(path) == (where == "elsewhere")
