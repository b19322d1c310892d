"""What is CUDA IPC's alone, on simulated CUDA; the rest is in test_cuda_transports.py."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.unit.cuda_pair import LIMIT_S, Pair, one_line
from vllm_dwdp.errors import DOCTOR, DwdpError
from vllm_dwdp.transport.cuda_memory import BLOCK


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair("cupy_ipc")
    yield made
    made.close()


def test_slabs_share_no_block(pair: Pair) -> None:
    pair.owner.allocate_slab(1)
    pair.owner.allocate_slab(BLOCK + 1)
    assert pair.machine.used[0] == 3 * BLOCK


def test_what_cuda_refuses_says_what_to_enable(pair: Pair) -> None:
    handle = pair.handle()
    pair.theirs.fail["ipc_open"] = "cudaErrorMapBufferObjectFailed"
    text = one_line(pair.reader, handle)
    for word in ("5000 bytes", "process 1000", "--ipc=host", "--pid=host", "MIG", "cudaErrorMapBufferObjectFailed"):
        assert word in text
    assert text.endswith(DOCTOR)
    pair.mine.fail["ipc_handle"] = "cudaErrorNotSupported"
    with pytest.raises(
        DwdpError, match=r"GPU 0 .* gives no IPC handle \(cudaErrorNotSupported\).* run `vllm-dwdp doctor`$"
    ):
        pair.handle()


def test_cupy_is_imported_only_when_a_device_is_opened() -> None:
    code = (
        "import sys, vllm_dwdp.prefetch.prefetcher\n"
        "from vllm_dwdp.transport import cuda_bindings, cuda_pinned, cupy_ipc, vmm\n"
        "assert not {'cuda', 'cupy', 'torch', 'vllm'} & set(sys.modules), sorted(sys.modules)\n"
        "sys.modules['cupy'] = None\n"
        "from vllm_dwdp.transport.cuda_cupy import CupyDevice\n"
        "CupyDevice(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert "DwdpError: CuPy cannot be imported" in done.stderr and "cuda13" in done.stderr and DOCTOR in done.stderr
