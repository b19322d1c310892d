"""What gpu_ipc.py measures with: compute of torch beside copies, and a slab of another process."""

import multiprocessing

from ci.checks.gpu_ranks import own_slab, transport_on
from vllm_dwdp.transport.base import Memory, Transport
from vllm_dwdp.transport.cuda_copy import CopyOptions
from vllm_dwdp.transport.cuda_cupy import CupyDevice


class TorchCompute:
    """Compute on a real device."""

    def __init__(self, device: CupyDevice) -> None:
        import torch

        self.torch, self.device = torch, device
        self.left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.product = torch.empty_like(self.left)
        self.matmul()
        torch.cuda._sleep(1000)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.cuda._sleep(20_000_000)
        end.record()
        torch.cuda.synchronize()
        self.cycles_per_s = 20_000_000 / (begin.elapsed_time(end) * 1e-3)

    def sleep(self, stream: int, seconds: float) -> None:
        cuda = self.torch.cuda
        on = cuda.current_stream() if stream == self.device.compute_stream() else cuda.ExternalStream(stream)
        with cuda.stream(on):
            cuda._sleep(int(seconds * self.cycles_per_s))

    def matmul(self) -> None:
        self.torch.mm(self.left, self.left, out=self.product)


class Mapped:
    """A slab of `nbytes` of another process, mapped here, and a device and a transport to go with it."""

    def __init__(self, kind: str, nbytes: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.owner = spawn.Process(target=own_slab, args=(theirs, kind, nbytes), daemon=False)
        self.owner.start()
        theirs.close()
        try:
            self.device = CupyDevice(0)
            self.transport: Transport = transport_on(self.device, kind, CopyOptions())
            self.source: Memory = self.transport.map_peer(self.pipe.recv())
        except BaseException:
            self.owner.kill()
            raise

    def __enter__(self) -> "Mapped":
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()
        self.pipe.close()
        self.owner.join(30)
        if self.owner.is_alive():
            self.owner.kill()
