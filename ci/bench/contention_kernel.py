"""For contention.py: copies by a kernel that loads over the link, in place of copy engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ci.bench.contention_ways import PIECE
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.base import Copy, CopyEngine, Event, Exposed, Program

#: 512 threads, of which each has 128 bytes under way in loads of 16.
WARPS = 16


@triton.jit(do_not_specialize=["count"])
def copy_kernel(pieces_ptr, count, WORDS: tl.constexpr):
    """pieces: int64 [count, 2], addresses to write and to read, of WORDS times four bytes; program i of n takes pieces
    i, i + n, ... No masks, with which loads would be narrow."""
    at = tl.arange(0, WORDS)
    for piece in range(tl.program_id(0), count, tl.num_programs(0)):
        target = tl.multiple_of(tl.load(pieces_ptr + 2 * piece).to(tl.pointer_type(tl.int32)), 16)
        source = tl.multiple_of(tl.load(pieces_ptr + 2 * piece + 1).to(tl.pointer_type(tl.int32)), 16)
        tl.store(target + at, tl.load(source + at))


@dataclass(frozen=True, eq=False)
class KernelProgram(Program):
    """pieces: int64 [copies, 2], see copy_kernel."""

    pieces: torch.Tensor


class KernelEngine(CopyEngine):
    """See CopyEngine; it copies on the compute stream, in pieces of PIECE bytes exactly."""

    def __init__(self, engine: CopyEngine, device: torch.device, programs: int) -> None:
        """engine: of the same device; it makes the events, and is the caller's to close. programs: 0 for one on each
        multiprocessor."""
        self._engine, self._device = engine, device
        self.programs = programs or multiprocessors(device)

    def bind(self, pulls: Sequence[Copy], local: Sequence[Copy] = ()) -> KernelProgram:
        """See CopyEngine. Raises DwdpError for a copy that is not one aligned piece."""
        copies = [*pulls, *local]
        for dst, src, nbytes in copies:
            if nbytes != PIECE or (dst | src) % 16:
                raise DwdpError(
                    f"a copy of {nbytes} bytes from {src:#x} to {dst:#x}: the kernel takes {PIECE} at multiples of 16"
                )
        pulled, merged = PIECE * len(pulls), PIECE * len(local)
        places = torch.tensor([copy[:2] for copy in copies], dtype=torch.int64).reshape(-1, 2)
        return KernelProgram(pulled, merged, len(copies), places.to(self._device))

    def submit(self, program: Program, after: Event | None = None) -> Event:
        """See CopyEngine; compute that was issued before comes first."""
        if not isinstance(program, KernelProgram):
            raise DwdpError(f"a {type(program).__name__} reached the kernel that copies: submit what its bind returned")
        copy_kernel[(self.programs,)](program.pieces, program.copies, WORDS=PIECE // 4, num_warps=WARPS, num_stages=1)
        return self._engine.record()

    def record(self) -> Event:
        return self._engine.record()

    def wait(self, event: Event, timeout_s: float) -> None:
        self._engine.wait(event, timeout_s)

    def take_exposed(self) -> Exposed:
        return self._engine.take_exposed()

    def finish(self, event: Event, timeout_s: float) -> None:
        self._engine.finish(event, timeout_s)

    def ready(self, event: Event) -> bool:
        return self._engine.ready(event)

    def close(self, timeout_s: float) -> None:
        """Nothing of it is left: see __init__."""


def multiprocessors(device: torch.device) -> int:
    """1 where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
