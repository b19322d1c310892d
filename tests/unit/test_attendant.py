"""The thread of an owner that launches what others ask for, with a function of Python's or of libc's in CUDA's place."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from vllm_dwdp.errors import DwdpTimeout
from vllm_dwdp.travel import attendant as module
from vllm_dwdp.travel.attendant import Attendant

LIMIT_S = 20.0
#: Graphs of requesters 0 and 2 of three, by bucket, and their streams.
GRAPHS = {0: [100, 101], 2: [120, 121, 122]}
STREAMS = {0: 7, 2: 9}


class Owner:
    """An attendant, what it has launched, and what the next launches return."""

    def __init__(self) -> None:
        self.bells = np.zeros(3, dtype=np.int64)
        self.launched: list[tuple[int, int]] = []
        self.code = 0
        self.held = threading.Event()
        self.held.set()

        def launch(graph: int, stream: int) -> int:
            self.launched.append((graph, stream))
            self.held.wait(LIMIT_S)
            return self.code

        prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        self.launch = prototype(launch)
        self.prepared: list[str] = []

    def open(self) -> Attendant:
        self.attendant = Attendant(self.bells, GRAPHS, STREAMS, self.launch)
        return self.attendant

    def start(self) -> None:
        self.attendant.start(lambda: self.prepared.append(threading.current_thread().name))

    def ring(self, who: int, number: int, bucket: int) -> None:
        """As kernels/travel.py."""
        self.bells[who] = number * 256 + bucket


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.held.set()
    made.attendant.stop(LIMIT_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "dwdp-attendant"]


def test_each_request_is_launched_once_as_its_bell_says(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that come after long without any, of numbers that wrapped, and of the same number in another bucket."""
    monkeypatch.setattr(module, "_BUSY_LOOKS", 10)
    owner.open()
    owner.start()
    until(lambda: owner.prepared == ["dwdp-attendant"])
    expected = []
    for who, number, bucket in ((0, 1, 0), (2, 1, 2), (0, 2, 1), (2, (1 << 31) - 1, 1), (2, -(1 << 31), 2), (2, -1, 0)):
        owner.ring(who, number, bucket)
        expected.append((GRAPHS[who][bucket], STREAMS[who]))
        until(lambda: owner.attendant.served == len(expected))
        time.sleep(5e-3)  # many looks, each of them asleep
    assert owner.launched == expected and owner.attendant.failed == 0


def test_bells_that_were_rung_before_are_not_served_again(owner: Owner) -> None:
    owner.ring(0, -5, 1)
    owner.ring(2, 7, 0)
    owner.open()
    owner.start()
    owner.ring(2, 8, 1)
    until(lambda: owner.attendant.served)
    assert owner.launched == [(121, 9)]


def test_a_launch_that_fails_ends_the_loop(owner: Owner) -> None:
    owner.code = 719
    attendant = owner.open()
    owner.start()
    owner.ring(0, 1, 0)
    until(lambda: attendant.failed)
    owner.ring(2, 1, 0)
    time.sleep(0.02)
    assert (attendant.failed, attendant.served, owner.launched) == (719, 0, [(100, 7)])
    attendant.stop(LIMIT_S)
    attendant.stop(LIMIT_S)


def test_a_bucket_that_nobody_has_fails_and_is_not_read(owner: Owner) -> None:
    """What lies behind the table of graphs is nobody's graph."""
    owner.code = 1
    attendant = owner.open()
    owner.start()
    owner.ring(0, 1, 255)
    until(lambda: attendant.failed)
    assert owner.launched == [(None, 7)], "no graph at all, which CUDA refuses"


def test_stop_has_a_limit(owner: Owner) -> None:
    attendant = owner.open()
    owner.start()
    owner.held.clear()
    owner.ring(0, 1, 0)
    until(lambda: owner.launched)
    with pytest.raises(DwdpTimeout, match=r"has not ended after 0\.05 s: look for a stalled device"):
        attendant.stop(0.05)
    owner.held.set()
    attendant.stop(LIMIT_S)


def test_stopped_before_it_began(owner: Owner) -> None:
    owner.open().stop(0.0)


#: libc writes the time, at the address that stands for a graph, and returns 0.
ALONE = """
import ctypes, sys, threading, time
import numpy as np
from vllm_dwdp.travel.attendant import Attendant

launch = ctypes.CDLL(None).gettimeofday
launch.argtypes, launch.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_int
bells, times = np.zeros(2, dtype=np.int64), np.zeros((1000, 2), dtype=np.int64)
attendant = Attendant(bells, {1: [row.ctypes.data for row in times[:200]]}, {}, launch)
attendant.start(lambda: None)
counted = []
other = threading.Thread(target=lambda: [counted.append(time.sleep(0)) for _ in range(1000)])
other.start()
other.join()
assert len(counted) == 1000  # while the loop turns
sys.setswitchinterval(1000)  # nobody gets the lock from here on
begun = time.time()
for number in range(20):
    bells[1] = (number + 1) * 256 + number
    while attendant.served == number and time.time() < begun + 20:
        pass
ended = time.time()
sys.setswitchinterval(0.005)
attendant.stop(20)
seen = [second + micro * 1e-6 for second, micro in times[:20]]
assert attendant.served == 20 and begun - 1e-3 < min(seen) and max(seen) < ended, (attendant.served, begun, seen, ended)
print("free")
"""


def test_it_holds_no_interpreter_lock() -> None:
    """It serves while Python holds it, and Python runs while it looks. In a process of its own, which can be ended."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=60)
    assert done.stdout == "free\n", done.stderr
