"""Descriptors between real processes: the child owns memory files, as a rank does its pieces."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_dwdp.transport import vmm_socket
from vllm_dwdp.transport.vmm_socket import AT_ONCE, DescriptorServer, fetch

LIMIT_S = 30.0
COUNT = AT_ONCE + 5
OWNER = f"""
import os, sys
from vllm_dwdp.transport import vmm_socket
from vllm_dwdp.transport.vmm_socket import DescriptorServer
server = DescriptorServer()
descriptors = [os.memfd_create('piece') for _ in range({COUNT})]
for number, descriptor in enumerate(descriptors):
    os.write(descriptor, b'%d' % number)
print(server.name, server.offer(descriptors), flush=True)
sys.stdin.readline()
server.close()
print(len(os.listdir('/proc/self/fd')), flush=True)
"""


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=pipe, stdout=pipe, text=True) as child:
        yield child
        child.kill()


def said(owner: subprocess.Popen[str]) -> list[str]:
    assert owner.stdout is not None
    return owner.stdout.readline().split()


def open_here() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_all_descriptors_arrive_in_order_and_none_stays(owner: subprocess.Popen[str]) -> None:
    name, token = said(owner)
    before, seen = open_here(), []
    for descriptor in fetch(name, token, COUNT, LIMIT_S):
        assert not os.get_inheritable(descriptor)
        seen.append(os.pread(descriptor, 9, 0))
    assert seen == [b"%d" % number for number in range(COUNT)] and open_here() == before
    # Given up in the middle of a message.
    with contextlib.closing(fetch(name, token, COUNT, LIMIT_S)) as descriptors:
        assert os.pread(next(descriptors), 9, 0) == b"0" and open_here() > before
    assert open_here() == before
    owner.communicate("end\n", timeout=LIMIT_S)
    assert owner.returncode == 0


def test_an_owner_that_ends_in_order_keeps_nothing(owner: subprocess.Popen[str]) -> None:
    said(owner)
    out, _ = owner.communicate("end\n", timeout=LIMIT_S)
    assert int(out) == 4, "beside the three of every process, the one that lists them"


def test_an_owner_that_is_killed(owner: subprocess.Popen[str]) -> None:
    name, token = said(owner)
    before = open_here()
    with contextlib.closing(fetch(name, token, COUNT, LIMIT_S)) as descriptors:
        kept = os.dup(next(descriptors))
        owner.kill()
        owner.wait()
        # What has arrived is the reader's.
        assert os.pread(kept, 9, 0) == b"0"
        os.close(kept)
    with pytest.raises(ConnectionRefusedError):
        next(fetch(name, token, COUNT, LIMIT_S))
    assert open_here() == before


def test_a_server_closes_twice_and_withdraws() -> None:
    before = open_here()
    server = DescriptorServer()
    tokens = [server.offer([os.memfd_create("piece")]) for _ in range(2)]
    server.withdraw(tokens[0])
    server.withdraw(tokens[0])
    with pytest.raises(OSError, match="0 descriptors came"):
        next(fetch(server.name, tokens[0], 1, LIMIT_S))
    server.close()
    server.close()
    assert open_here() == before


def test_an_owner_that_answers_slowly_has_one_limit_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    server, send = DescriptorServer(), vmm_socket.socket.send_fds
    token = server.offer([os.memfd_create("piece") for _ in range(6)])

    def slowly(*given: Any) -> int:
        time.sleep(0.2)
        return send(*given)

    monkeypatch.setattr(vmm_socket, "AT_ONCE", 1)
    monkeypatch.setattr(vmm_socket.socket, "send_fds", slowly)
    with pytest.raises(TimeoutError):
        list(fetch(server.name, token, 6, 0.5))
    server.close()
