"""What the tests of shared memory have in common."""

import mmap
import os
import pickle
import subprocess
import sys
from pathlib import Path

from vllm_dwdp.transport.base import Handle

LIMIT_S = 30.0
PAGE = mmap.PAGESIZE


class LaunchOwner:
    """Whose life is that of a launch: its folder, its environment."""


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def slab_maps() -> int:
    return sum("memfd:dwdp-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def dies_of_a_fault(code: str, *handles: Handle) -> bool:
    """Whether `code`, with the handles as `handles`, is ended by SIGSEGV in a process of its own."""
    head = "import ctypes, pickle\nfrom vllm_dwdp.transport.shm import *\n"
    head += f"handles = pickle.loads({pickle.dumps(handles)!r})\n"
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, timeout=LIMIT_S, text=True)
    assert "before" in done.stdout, done.stderr
    return done.returncode == -11 and "after" not in done.stdout
