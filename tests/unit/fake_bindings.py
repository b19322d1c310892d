"""cuda.bindings.driver, made up: every call is written down, and answered with a code and what the test says."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

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
