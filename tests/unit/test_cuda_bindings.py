"""Which calls of cuda.bindings.driver the vmm transport makes, with which arguments. The driver is made up: no GPU here."""

from __future__ import annotations

import enum
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.cuda_bindings import BindingsVmm
from vllm_dwdp.transport.cuda_device import CudaError

SUCCESS, INVALID, NOT_PERMITTED = 0, 1, 800
MIB = 1 << 20


class Result(enum.IntEnum):
    CUDA_SUCCESS = SUCCESS
    CUDA_ERROR_INVALID_VALUE = INVALID
    CUDA_ERROR_NOT_PERMITTED = NOT_PERMITTED


class Driver:
    """As far as it goes: every call is written down, and answered with a code and what `answers` says."""

    CUmemAllocationHandleType = SimpleNamespace(
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR="fd", CU_MEM_HANDLE_TYPE_FABRIC="fabric"
    )
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM="least")
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READ="r", CU_MEM_ACCESS_FLAGS_PROT_READWRITE="rw")
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED="vmm",
        CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED="fd",
        CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED="fabric",
    )
    CUmemLocation = CUmemAllocationProp = CUmemAccessDesc = SimpleNamespace

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.attributes = {"vmm": 1, "fd": 1, "fabric": 1}
        self.codes: dict[str, Result] = {}
        self.answers: dict[str, Any] = {
            "cuDeviceGet": "device 1",
            "cuMemGetAllocationGranularity": 2 * MIB,
            "cuMemAddressReserve": 1 << 40,
            "cuMemCreate": 77,
            "cuMemRetainAllocationHandle": 78,
            "cuMemExportToShareableHandle": 9,
            "cuMemImportFromShareableHandle": 79,
            "cuGetErrorName": b"CUDA_ERROR_NOT_PERMITTED",
            "cuGetErrorString": b"operation not permitted",
        }

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            code = self.codes.get(name, Result.CUDA_SUCCESS)
            if name == "cuDeviceGetAttribute":
                return code, self.attributes[arguments[0]]
            return (code, self.answers[name]) if name in self.answers else (code,)

        return call

    def called(self, name: str) -> tuple[Any, ...]:
        """The arguments of the last call of `name`."""
        return [call[1:] for call in self.calls if call[0] == name][-1]


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
