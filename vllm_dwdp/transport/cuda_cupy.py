"""CudaDevice on CuPy's thin layer over the CUDA runtime (cupy.cuda.runtime, CuPy 14.2.0), and torch where CuPy falls short.

CuPy is linked with a CUDA runtime of its own; it shares contexts, streams and memory with torch's, but not the record of
the last error, so that a query that says 'not ready' leaves nothing behind for torch to stumble over.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from vllm_dwdp.errors import DOCTOR, DwdpError, install
from vllm_dwdp.transport.cuda_device import CudaDevice, CudaError, DeviceInfo, DeviceMemory

if TYPE_CHECKING:
    import torch

_NOT_READY: Final = 600  # cudaErrorNotReady; eventQuery returns the code instead of raising
_PORTABLE: Final = 1  # cudaHostRegisterPortable
_HIGHEST_PRIORITY: Final = -5  # CUDA clamps to what the device has
_LEGACY_STREAM: Final = 0


def _import_runtime() -> Any:
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        raise DwdpError(
            f"CuPy cannot be imported ({error}): {install('cuda13')}, cuda12 with vLLM for CUDA 12{DOCTOR}"
        ) from error
    return runtime


class _ArrayInterface:
    """What torch.as_tensor reads; torch keeps it, and so `owner`, alive as long as any view of the memory."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),  # torch refuses read-only memory
            "strides": None,
            "version": 2,
        }


class CupyDevice(CudaDevice):
    """See CudaDevice."""

    def __init__(self, index: int) -> None:
        """Device `index` of this process, made current for the calling thread. Raises DwdpError without CuPy or a GPU."""
        self._runtime = _import_runtime()
        count = int(self._checked("getDeviceCount")())
        if not 0 <= index < count:
            raise DwdpError(
                f"GPU {index} of {count} visible ones: check CUDA_VISIBLE_DEVICES and dwdp.ranks_per_device"
            )
        import torch

        self._torch = torch
        self.index = index
        torch.cuda.set_device(index)
        self._checked("setDevice")(index)
        # Looked up once: these are called in every layer.
        self._record = self._checked("eventRecord")
        self._wait_event = self._checked("streamWaitEvent")
        self._query = self._checked("eventQuery")
        self._launch = self._checked("graphLaunch")
        self._copy = self._checked("memcpyAsync")
        self._is_capturing = self._checked("streamIsCapturing")
        # As torch.cuda.current_stream, without an object for each answer; Triton asks this way before every launch.
        self._current_stream = torch._C._cuda_getCurrentRawStream

    def devices(self) -> tuple[DeviceInfo, ...]:
        """See CudaDevice. UUIDs are torch's: CuPy's end at their first zero byte."""
        cuda = self._torch.cuda
        found = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
        return tuple(DeviceInfo(index, f"GPU-{item.uuid}", item.name) for index, item in enumerate(found))

    def driver_version(self) -> int:
        return int(self._checked("driverGetVersion")())

    def can_access_peer(self, peer: int) -> bool:
        return bool(self._checked("deviceCanAccessPeer")(self.index, peer))

    def memory(self) -> DeviceMemory:
        return DeviceMemory(*self._checked("memGetInfo")())

    def empty_cache(self) -> None:
        self._torch.cuda.empty_cache()

    def malloc(self, nbytes: int) -> int:
        return int(self._checked("malloc")(nbytes))

    def free(self, address: int) -> None:
        self._checked("free")(address)

    def zero(self, address: int, nbytes: int) -> None:
        self._checked("memset")(address, 0, nbytes)
        self._checked("streamSynchronize")(_LEGACY_STREAM)

    def tensor(self, address: int, nbytes: int, owner: object) -> "torch.Tensor":
        # Made under inference mode it could not be written to outside of it.
        with self._torch.inference_mode(False):
            return self._torch.as_tensor(_ArrayInterface(address, nbytes, owner))

    def local_tensor(self, address: int, nbytes: int, owner: object) -> "torch.Tensor":
        """See CudaDevice. torch asks the driver where an array lies, but believes what DLPack says."""
        import cupy

        memory = cupy.cuda.UnownedMemory(address, nbytes, owner, device_id=self.index)
        array = cupy.ndarray((nbytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
        with self._torch.inference_mode(False):
            return self._torch.from_dlpack(array)

    def ipc_handle(self, address: int) -> bytes:
        return bytes(self._checked("ipcGetMemHandle")(address))

    def ipc_open(self, handle: bytes) -> int:
        return int(self._checked("ipcOpenMemHandle")(handle))

    def ipc_close(self, address: int) -> None:
        self._checked("ipcCloseMemHandle")(address)

    def host_register(self, address: int, nbytes: int) -> None:
        self._checked("hostRegister")(address, nbytes, _PORTABLE)

    def host_unregister(self, address: int) -> None:
        self._checked("hostUnregister")(address)

    def make_stream(self) -> int:
        flags = self._runtime.streamNonBlocking
        return int(self._checked("streamCreateWithPriority")(flags, _HIGHEST_PRIORITY))

    def destroy_stream(self, stream: int) -> None:
        self._checked("streamDestroy")(stream)

    def compute_stream(self) -> int:
        return int(self._current_stream(self.index))

    def make_event(self, timing: bool) -> int:
        flags = self._runtime.eventDefault if timing else self._runtime.eventDisableTiming
        return int(self._checked("eventCreateWithFlags")(flags))

    def destroy_event(self, event: int) -> None:
        self._checked("eventDestroy")(event)

    def record(self, event: int, stream: int) -> None:
        self._record(event, stream)

    def wait_event(self, stream: int, event: int) -> None:
        self._wait_event(stream, event)

    def query(self, event: int) -> bool:
        code = self._query(event)
        if code == _NOT_READY:
            return False
        if code:
            self._checked("check_status")(code)
        return True

    def elapsed_s(self, begin: int, end: int) -> float:
        return float(self._checked("eventElapsedTime")(begin, end)) * 1e-3

    def copy_async(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        self._copy(dst, src, nbytes, self._runtime.memcpyDefault, stream)

    def capturing(self, stream: int) -> bool:
        return bool(self._is_capturing(stream))

    def begin_capture(self, stream: int) -> None:
        self._checked("streamBeginCapture")(stream, self._runtime.streamCaptureModeRelaxed)

    def end_capture(self, stream: int) -> int:
        template = self._checked("streamEndCapture")(stream)
        try:
            return self.instantiate(template, stream)
        finally:
            self._checked("graphDestroy")(template)

    def instantiate(self, template: int, stream: int) -> int:
        graph = int(self._checked("graphInstantiate")(template))
        self._checked("graphUpload")(graph, stream)
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._launch(graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._checked("graphExecDestroy")(graph)

    def _checked(self, name: str) -> Callable[..., Any]:
        """A call of CuPy's runtime module whose failure is a CudaError."""
        call = getattr(self._runtime, name)

        def run(*arguments: object) -> Any:
            try:
                return call(*arguments)
            except RuntimeError as error:  # CUDARuntimeError, and streamIsCapturing's plain one
                code, _, reason = str(error).partition(": ")
                raise CudaError(name, code, reason or "no further word") from error

        return run
