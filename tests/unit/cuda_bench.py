"""A copy engine on simulated CUDA, with one source and one target."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from tests.unit.cuda_rank import LIMIT_S, process_id
from tests.unit.fake_cuda import FakeCuda, Machine
from vllm_dwdp.transport.base import Copy
from vllm_dwdp.transport.cuda_copy import CopyOptions, CudaProgram
from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport

SIZE = 4096


class Bench:
    """One process with a source and a target of SIZE bytes."""

    def __init__(self, **options: object) -> None:
        self.machine = Machine()
        self.device: FakeCuda = self.machine.process()
        self.transport = CupyIpcTransport(self.device, CopyOptions(**options), process_id(0))  # type: ignore[arg-type]
        self.source, self.target = self.transport.allocate_slab(SIZE), self.transport.allocate_slot(SIZE)
        self.source.tensor().random_()
        self.engine = self.transport.copy_engine()

    def program(self, slices: int = 4) -> CudaProgram:
        step = SIZE // slices
        copies = [Copy(self.target.address + at, self.source.address + at, step) for at in range(0, SIZE, step)]
        return self.engine.bind(copies[1:], copies[:1])

    def arrived(self) -> bool:
        return bool((self.source.tensor() == self.target.tensor()).all())


@contextmanager
def open_bench() -> Iterator[Bench]:
    """Closed afterwards; fails where something of it stays."""
    made = Bench()
    yield made
    made.machine.frozen = False
    made.engine.close(LIMIT_S)
    made.engine.close(LIMIT_S)
    made.transport.close()
    gc.collect()
    assert made.device.clean()
