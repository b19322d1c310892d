"""Which calls of cuda.bindings.driver the vmm transport makes, with which arguments. The driver is made up: no GPU here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from tests.unit.fake_bindings import MIB, Driver, Result
from vllm_dwdp.doctor.gpu_rank import Shares, shares
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.cuda_bindings import BindingsVmm
from vllm_dwdp.transport.cuda_device import CudaError


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def vmm(driver: Driver) -> BindingsVmm:
    return BindingsVmm(1, driver)


def test_memory_is_made_for_descriptors(driver: Driver, vmm: BindingsVmm) -> None:
    assert vmm.granularity() == 2 * MIB
    properties, which = driver.called("cuMemGetAllocationGranularity")
    assert which == "least"
    assert vmm.create(4 * MIB) == 77
    assert driver.called("cuMemCreate") == (4 * MIB, properties, 0)
    assert (properties.type, properties.requestedHandleTypes) == ("pinned", "fd")
    assert (properties.location.type, properties.location.id) == ("device", 1)
    assert vmm.export(77) == 9 and driver.called("cuMemExportToShareableHandle") == (77, "fd", 0)
    assert vmm.import_descriptor(9) == 79 and driver.called("cuMemImportFromShareableHandle") == (9, "fd")


def test_addresses_mappings_and_access(driver: Driver, vmm: BindingsVmm) -> None:
    assert vmm.reserve(6 * MIB) == 1 << 40 and driver.called("cuMemAddressReserve") == (6 * MIB, 0, 0, 0)
    vmm.map(1 << 40, 2 * MIB, 77)
    assert driver.called("cuMemMap") == (1 << 40, 2 * MIB, 0, 77, 0)
    for writable, flags in ((True, "rw"), (False, "r")):
        vmm.set_access(1 << 40, 2 * MIB, writable)
        address, nbytes, [access], count = driver.called("cuMemSetAccess")
        assert (address, nbytes, count) == (1 << 40, 2 * MIB, 1)
        assert access.flags == flags and (access.location.type, access.location.id) == ("device", 1)
    assert vmm.retain(1 << 40) == 78 and driver.called("cuMemRetainAllocationHandle") == (1 << 40,)
    vmm.release(78)
    vmm.synchronize()
    vmm.unmap(1 << 40, 2 * MIB)
    vmm.free_range(1 << 40, 6 * MIB)
    assert driver.calls[-4:] == [
        ("cuMemRelease", 78),
        ("cuCtxSynchronize",),
        ("cuMemUnmap", 1 << 40, 2 * MIB),
        ("cuMemAddressFree", 1 << 40, 6 * MIB),
    ]


def test_what_the_device_cannot(driver: Driver, vmm: BindingsVmm) -> None:
    assert vmm.why_not() == ""
    driver.attributes["fd"] = 0
    assert "file descriptor" in vmm.why_not()
    driver.attributes["vmm"] = 0
    assert "no virtual memory management" in vmm.why_not()
    assert driver.called("cuDeviceGetAttribute")[1] == "device 1"


def test_fabric_handles_are_tried(driver: Driver, vmm: BindingsVmm) -> None:
    assert vmm.fabric() and driver.calls[-1] == ("cuMemRelease", 77)
    assert driver.called("cuMemCreate")[1].requestedHandleTypes == "fabric"
    driver.codes["cuMemCreate"] = Result.CUDA_ERROR_NOT_PERMITTED
    before = len(driver.calls)
    assert not vmm.fabric() and "cuMemRelease" not in [call[0] for call in driver.calls[before:]]
    driver.attributes["fabric"] = 0
    before = len(driver.calls)
    assert not vmm.fabric() and len(driver.calls) == before + 1


def test_a_failed_call_has_the_drivers_words(driver: Driver, vmm: BindingsVmm) -> None:
    driver.codes["cuMemMap"] = Result.CUDA_ERROR_NOT_PERMITTED
    with pytest.raises(CudaError) as caught:
        vmm.map(0, 1, 2)
    error = caught.value
    assert (error.call, error.code, error.reason) == ("cuMemMap", "CUDA_ERROR_NOT_PERMITTED", "operation not permitted")
    assert "\n" not in str(error)
    driver.answers |= {"cuGetErrorName": None, "cuGetErrorString": None}
    with pytest.raises(CudaError, match="cuMemMap failed"):
        vmm.map(0, 1, 2)


def test_without_cuda_bindings() -> None:
    code = (
        "import sys\nsys.modules['cuda'] = None\n"
        "from vllm_dwdp.transport.cuda_bindings import BindingsVmm\nBindingsVmm(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    line = done.stderr.splitlines()[-1]
    assert "DwdpError: cuda.bindings cannot be imported" in line and '"cupy_ipc"' in line
    assert issubclass(CudaError, DwdpError)


def test_what_the_doctor_tries() -> None:
    driver = Driver()

    def asked() -> Shares | None:
        driver.calls.clear()
        driver.answers["cuMemExportToShareableHandle"] = os.memfd_create("made up")
        try:
            return shares(0, driver)
        finally:
            left = [call[0] for call in driver.calls]
            assert left.count("cuMemCreate") - bool(driver.codes.get("cuMemCreate")) == left.count("cuMemRelease")
            with contextlib.suppress(OSError):
                os.close(driver.answers["cuMemExportToShareableHandle"])

    assert asked() == (True, True)
    driver.attributes["fabric"] = 0
    assert asked() == (True, False)
    for call in ("cuMemExportToShareableHandle", "cuMemCreate", "cuDeviceGet"):
        driver.codes = {call: Result.CUDA_ERROR_NOT_PERMITTED}
        assert asked() == (False, False)
    driver.codes, driver.attributes["fd"] = {}, 0
    assert asked() == (False, False)
    assert shares(0) is None  # cuda.bindings is not installed here
