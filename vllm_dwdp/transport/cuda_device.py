"""The CUDA calls that the transports and the copy engine make, and nothing else: one object per device and process.

Streams, events and graphs are raw handles (ints), so that a step makes no object but what CUDA needs, and so that tests
can put a simulated device in place of this one. Every call raises CudaError; none synchronises unless it says so.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vllm_dwdp.errors import DwdpError

if TYPE_CHECKING:
    import torch


class CudaError(DwdpError):
    """A CUDA call failed; `code` is CUDA's name of the error, such as 'cudaErrorMemoryAllocation'."""

    def __init__(self, call: str, code: str, reason: str) -> None:
        super().__init__(f"{call} failed ({code}: {reason}): look at the first error of this worker's log")
        self.call = call
        self.code = code
        self.reason = reason

    @property
    def in_capture(self) -> bool:
        """Whether CUDA refused the call for a stream that is captured."""
        return self.code.startswith("cudaErrorStreamCapture") or self.code == "cudaErrorCapturedEvent"

    def __reduce__(self) -> tuple[type["CudaError"], tuple[str, str, str]]:
        return type(self), (self.call, self.code, self.reason)


@dataclass(frozen=True)
class DeviceInfo:
    """index: among the devices this process sees. uuid: the same in every process, whatever devices that one sees."""

    index: int
    uuid: str
    name: str

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, {self.uuid})"


class DeviceMemory(NamedTuple):
    """Bytes of the device, those of other processes included."""

    free: int
    total: int


class CudaDevice(ABC):
    """One device, for use by the thread that made it current."""

    index: int

    # What there is.

    @abstractmethod
    def devices(self) -> tuple[DeviceInfo, ...]:
        """All devices this process sees, by index."""

    @abstractmethod
    def driver_version(self) -> int:
        """CUDA version of the driver, as 1000 * major + 10 * minor."""

    @abstractmethod
    def can_access_peer(self, peer: int) -> bool:
        """Whether this device can read the memory of device `peer`."""

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """Free and total bytes."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Give memory that torch keeps for later back to the device; may synchronise."""

    # Memory. Addresses are of the unified address space.

    @abstractmethod
    def malloc(self, nbytes: int) -> int:
        """cudaMalloc; 256-byte aligned at least."""

    @abstractmethod
    def free(self, address: int) -> None:
        """cudaFree; synchronises."""

    @abstractmethod
    def zero(self, address: int, nbytes: int) -> None:
        """Fill with zeros; synchronises, so that any stream and process sees them."""

    @abstractmethod
    def tensor(self, address: int, nbytes: int, owner: object) -> "torch.Tensor":
        """uint8 [nbytes] over device memory, without a copy; it keeps `owner` alive."""

    @abstractmethod
    def local_tensor(self, address: int, nbytes: int, owner: object) -> "torch.Tensor":
        """As `tensor`, said to be on this device though another one's memory may be mapped at `address`: kernels on it run
        here, where access was given."""

    @abstractmethod
    def ipc_handle(self, address: int) -> bytes:
        """64 bytes with which other processes of this host can map a cudaMalloc allocation, given its first address."""

    @abstractmethod
    def ipc_open(self, handle: bytes) -> int:
        """Map another process's allocation for this device, with peer access where it lies on another one."""

    @abstractmethod
    def ipc_close(self, address: int) -> None:
        """Unmap what `ipc_open` returned."""

    @abstractmethod
    def host_register(self, address: int, nbytes: int) -> None:
        """Pin host memory that this process has mapped writable, so that copy engines can read it."""

    @abstractmethod
    def host_unregister(self, address: int) -> None:
        """Undo `host_register`."""

    # Streams and events.

    @abstractmethod
    def make_stream(self) -> int:
        """A stream of the highest priority that does not wait for the legacy default stream, nor the other way round."""

    @abstractmethod
    def destroy_stream(self, stream: int) -> None:
        """Its work still ends."""

    @abstractmethod
    def compute_stream(self) -> int:
        """torch's current stream of this device in this thread."""

    @abstractmethod
    def make_event(self, timing: bool) -> int:
        """An event; one without timing is cheaper."""

    @abstractmethod
    def destroy_event(self, event: int) -> None:
        """Work that waits for it still does."""

    @abstractmethod
    def record(self, event: int, stream: int) -> None:
        """The event now stands for the end of all work given to `stream` so far; earlier waits for it are not changed."""

    @abstractmethod
    def wait_event(self, stream: int, event: int) -> None:
        """Work given to `stream` from now on waits for what `event` stands for now; the host does not wait."""

    @abstractmethod
    def query(self, event: int) -> bool:
        """Whether what `event` stands for is done. Not allowed while this process captures (it breaks the capture)."""

    @abstractmethod
    def elapsed_s(self, begin: int, end: int) -> float:
        """Seconds between two events with timing that are done, to about half a microsecond; of any streams of the device,
        negative where `end` came first."""

    @abstractmethod
    def copy_async(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Copy between any two addresses of the unified address space; host memory must be pinned."""

    # Graphs.

    @abstractmethod
    def capturing(self, stream: int) -> bool:
        """Whether work given to `stream` is captured instead of run."""

    @abstractmethod
    def begin_capture(self, stream: int) -> None:
        """Capture work given to `stream`, and to streams that wait for it, without restricting other calls."""

    @abstractmethod
    def end_capture(self, stream: int) -> int:
        """Returns what was captured, ready to launch, uploaded to the device."""

    @abstractmethod
    def instantiate(self, template: int, stream: int) -> int:
        """A captured graph (cudaGraph_t, which stays the caller's), ready to launch, uploaded to the device."""

    @abstractmethod
    def launch(self, graph: int, stream: int) -> None:
        """Run a graph behind all work of `stream`."""

    @abstractmethod
    def destroy_graph(self, graph: int) -> None:
        """A launch that is under way still ends."""
