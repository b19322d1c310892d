"""VmmCalls on NVIDIA's cuda-bindings, which torch's and vLLM's CUDA wheels bring; CuPy has no such calls."""

import importlib
from typing import Any, Final

from vllm_dwdp.errors import DOCTOR, DwdpError
from vllm_dwdp.transport.cuda_device import CudaError
from vllm_dwdp.transport.cuda_vmm import INSTEAD, VmmCalls

_SUCCESS: Final = 0


def import_driver() -> Any:
    """cuda.bindings.driver; raises DwdpError where it is not installed, or does not fit the driver."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DwdpError(
            f"cuda.bindings cannot be imported ({error}): pip install cuda-bindings of CUDA's major version, or "
            f"{INSTEAD}{DOCTOR}"
        ) from error


class BindingsVmm(VmmCalls):
    """See VmmCalls."""

    def __init__(self, index: int, driver: Any = None) -> None:
        """Device `index` of this process, whose context is current for the calling thread. driver: in place of
        cuda.bindings.driver, for tests. Raises DwdpError without it."""
        self._driver = driver = driver or import_driver()
        self._device = self._call("cuDeviceGet", index)
        types = driver.CUmemAllocationHandleType
        self._posix = types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._fabric = types.CU_MEM_HANDLE_TYPE_FABRIC
        self._location = driver.CUmemLocation()
        self._location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._location.id = index

    def why_not(self) -> str:
        if not self._has("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"):
            return "the device has no virtual memory management"
        if not self._has("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"):
            return "the device's memory cannot be exported as a file descriptor"
        return ""

    def fabric(self) -> bool:
        if not self._has("HANDLE_TYPE_FABRIC_SUPPORTED"):
            return False
        try:
            properties = self._properties(self._fabric)
            handle = self._call("cuMemCreate", self._granularity(properties), properties, 0)
        except CudaError:
            return False
        self.release(int(handle))
        return True

    def granularity(self) -> int:
        return self._granularity(self._properties(self._posix))

    def reserve(self, nbytes: int) -> int:
        return int(self._call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def free_range(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int) -> int:
        return int(self._call("cuMemCreate", nbytes, self._properties(self._posix), 0))

    def retain(self, address: int) -> int:
        return int(self._call("cuMemRetainAllocationHandle", address))

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    def export(self, handle: int) -> int:
        return int(self._call("cuMemExportToShareableHandle", handle, self._posix, 0))

    def import_descriptor(self, descriptor: int) -> int:
        return int(self._call("cuMemImportFromShareableHandle", descriptor, self._posix))

    def map(self, address: int, nbytes: int, handle: int) -> None:
        self._call("cuMemMap", address, nbytes, 0, handle, 0)

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", address, nbytes)

    def set_access(self, address: int, nbytes: int, writable: bool) -> None:
        flags = self._driver.CUmemAccess_flags
        access = self._driver.CUmemAccessDesc()
        access.location = self._location
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        self._call("cuMemSetAccess", address, nbytes, [access], 1)

    def synchronize(self) -> None:
        self._call("cuCtxSynchronize")

    def _has(self, attribute: str) -> bool:
        wanted = getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}")
        return bool(self._call("cuDeviceGetAttribute", wanted, self._device))

    def _properties(self, handle_type: Any) -> Any:
        made = self._driver.CUmemAllocationProp()
        made.type = self._driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        made.location = self._location
        made.requestedHandleTypes = handle_type
        return made

    def _granularity(self, properties: Any) -> int:
        least = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._call("cuMemGetAllocationGranularity", properties, least))

    def _call(self, name: str, *arguments: object) -> Any:
        """What the call answered beside its code, None where that is all. Raises CudaError."""
        code, *answer = getattr(self._driver, name)(*arguments)
        if int(code) != _SUCCESS:
            raise CudaError(name, *(self._words(call, code) for call in ("cuGetErrorName", "cuGetErrorString")))
        return answer[0] if answer else None

    def _words(self, call: str, code: Any) -> str:
        """The driver's name of an error, or what is known of it."""
        _, text = getattr(self._driver, call)(code)
        return text.decode() if isinstance(text, bytes) else str(getattr(code, "name", code))
