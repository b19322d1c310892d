"""One GPU in a process of its own, over the transport that ranks use: what it may map of others, and how fast it reads."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from vllm_dwdp.doctor.readings import Offer, Read
from vllm_dwdp.errors import DOCTOR, DwdpError
from vllm_dwdp.transport.base import Copy, Handle
from vllm_dwdp.transport.cuda_bindings import BindingsVmm
from vllm_dwdp.transport.cuda_device import CudaDevice, CudaError
from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport
from vllm_dwdp.transport.devices import find_device
from vllm_dwdp.transport.process import ProcessId

#: Copied after one warm-up: enough for the full rate of NVLink; less where memory is short.
NBYTES: Final = 256 << 20
SHORT_NBYTES: Final = 16 << 20
_ROUNDS: Final = 3
_LIMIT_S: Final = 20.0
#: Bytes at the end of a copy that are compared.
_COMPARED: Final = 1 << 16


class GpuRank:
    """The doctor's stand-in for a rank; on exit everything of CUDA that it took is given back."""

    def __init__(
        self, device: CudaDevice, process: ProcessId | None = None, vmm: Callable[[int], Shares | None] | None = None
    ) -> None:
        """process, vmm: in place of this process and of `shares`, for tests."""
        self._device, self._vmm = device, vmm or shares
        self._transport = CupyIpcTransport(device, process=process)
        # Twice: the slab, and the slot into which others' are read. As much again stays free.
        enough = device.memory().free > 4 * NBYTES
        self._slab = self._transport.allocate_slab(NBYTES if enough else SHORT_NBYTES)

    def offer(self) -> Offer:
        """Fills the slab with this GPU's mark, and exports it."""
        info = self._device.devices()[self._device.index]
        tensor = self._slab.tensor()
        tensor.fill_(_mark(info.index))
        assert int(tensor[-1]) == _mark(info.index)  # asked for, so that the fill has ended
        handle, refused = None, ""
        try:
            handle = self._transport.export_handle(self._slab).to_dict()
        except DwdpError as error:
            refused = str(error).removesuffix(DOCTOR)
        told = self._vmm(info.index)
        vmm, fabric = told or (None, False)
        return Offer(info.index, info.uuid, info.name, self._device.driver_version(), handle, refused, vmm, fabric)

    def read(self, owner: dict[str, Any]) -> Read:
        """owner: `index` and `handle` of another process's offer."""
        here, there = self._device.index, int(owner["index"])
        handle = Handle.from_dict(owner["handle"])
        try:
            peer = find_device(handle.device.removeprefix("cuda:"), self._device.devices()).index
            access = peer == here or self._device.can_access_peer(peer)
            if not access:
                return Read(here, there, False, "", 0.0, True)
            source = self._transport.map_peer(handle)
        except DwdpError as error:
            return Read(here, there, True, str(error).removesuffix(DOCTOR), 0.0, True)
        try:
            nbytes = min(source.nbytes, self._slab.nbytes)
            slot = self._transport.allocate_slot(nbytes)
            engine = self._transport.copy_engine()
            try:
                program = engine.bind([Copy(slot.address, source.address, nbytes)])
                seconds = [self._timed(engine.stream, lambda: engine.submit(program)) for _ in range(1 + _ROUNDS)]
            finally:
                engine.close(_LIMIT_S)
            right = bool((slot.tensor()[-min(_COMPARED, nbytes) :] == _mark(there)).all())
            slot.close()
            return Read(here, there, True, "", nbytes / min(seconds[1:]), right)
        finally:
            self._transport.unmap_peer(source)

    def _timed(self, stream: int, work: Callable[[], object]) -> float:
        """Seconds of the copy stream from before `work` to its end; raises DwdpError where it does not end."""
        device, deadline = self._device, time.monotonic() + _LIMIT_S
        with contextlib.ExitStack() as stack:
            events = [device.make_event(timing=True) for _ in range(2)]
            for event in events:
                stack.callback(device.destroy_event, event)
            device.record(events[0], stream)
            work()
            device.record(events[1], stream)
            while not device.query(events[1]):
                if time.monotonic() > deadline:
                    raise DwdpError(f"a copy did not end within {_LIMIT_S:.0f} s: look for a stalled device")
                time.sleep(20e-6)
            return device.elapsed_s(*events)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transport.close()


def _mark(index: int) -> int:
    """What the slab of a GPU is filled with: never 0, which fresh memory holds."""
    return 1 + index % 255


class Shares(NamedTuple):
    """How this GPU's memory can be given to other processes (CUDA VMM)."""

    descriptors: bool
    fabric: bool


def shares(index: int, driver: Any = None) -> Shares | None:
    """As tried on device `index`, whose context is current; None where cuda.bindings is not installed. driver: in its
    place."""
    try:
        vmm = BindingsVmm(index, driver)
    except CudaError:
        return Shares(False, False)
    except DwdpError:
        return None
    try:
        if vmm.why_not():
            return Shares(False, False)
        handle = vmm.create(vmm.granularity())
        try:
            os.close(vmm.export(handle))
        finally:
            vmm.release(handle)
        return Shares(True, vmm.fabric())
    except CudaError:
        return Shares(False, False)
