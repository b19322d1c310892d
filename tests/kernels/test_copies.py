"""The kernel of ci/bench/contention.py that copies in place of copy engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ci.bench.contention_kernel import KernelEngine
from ci.bench.contention_ways import ALL, IN_STEP, ONE_SOURCE, PIECE, RING, Way, chosen
from tests.unit.pulling import group
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.base import Copy
from vllm_dwdp.transport.shm_copy import ShmCopyEngine, ShmEvent

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
#: Told in a process of its own, since what Triton interprets it cannot compile.
COMPILED = """
import json, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ci.bench.contention_kernel import WARPS, copy_kernel
from ci.bench.contention_ways import PIECE
from vllm_dwdp.kernels.bench.compile_report import spills

signature = {"pieces_ptr": "*i64", "count": "i32", "WORDS": "constexpr"}
source = ASTSource(copy_kernel, signature=signature, constexprs={(2,): PIECE // 4})
options = {"num_warps": WARPS, "num_stages": 1}
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
moves = re.findall(r"(?:ld|st)\\.global[.\\w]*v4", ptx)
print(json.dumps([[move[:2] for move in moves], spills(ptx, 90)[1]]))
"""


@pytest.mark.parametrize("kind", ["shm", "vmm"])
def test_it_brings_the_bytes_of_all_sources_and_no_others(kind: str) -> None:
    """Over shared memory and simulated CUDA, by fewer programs than pieces and by more."""
    ways = [*chosen("programs", gpus=True), Way(PIECE, programs=0), Way(PIECE, pattern=ONE_SOURCE, programs=5)]
    ways.append(Way(PIECE, pattern=IN_STEP, programs=3))
    assert {way.pattern for way in ways} == {ALL, RING, ONE_SOURCE, IN_STEP}
    made = group(kind, 3, ways)
    try:
        for number, way in enumerate(ways):
            assert made.wrong(number) == [0, 0, 0], way.name
    finally:
        made.close()


def test_the_event_of_its_end_is_recorded_behind_the_launch() -> None:
    target, source = torch.zeros(PIECE, dtype=torch.uint8), torch.ones(PIECE, dtype=torch.uint8)
    seen: list[int] = []

    class Events(ShmCopyEngine):
        def record(self) -> ShmEvent:
            seen.append(int(target.sum()))
            return super().record()

    engine = Events()
    kernel = KernelEngine(engine, CPU, 1)
    program = kernel.bind([Copy(target.data_ptr(), source.data_ptr(), PIECE)])
    kernel.finish(kernel.submit(program), 1.0)
    engine.close(1.0)
    assert (program.pulled_bytes, program.copies) == (PIECE, 1) and seen == [PIECE]


@pytest.mark.parametrize("copy", [Copy(0, 0, PIECE - 16), Copy(0, 0, 2 * PIECE), Copy(8, 0, PIECE), Copy(0, 4, PIECE)])
def test_it_takes_nothing_but_aligned_pieces(copy: Copy) -> None:
    with pytest.raises(DwdpError, match=f"the kernel takes {PIECE} at multiples of 16"):
        KernelEngine(ShmCopyEngine(), CPU, 1).bind([copy])


def test_each_thread_has_128_bytes_under_way_in_loads_of_16(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    moves, spilled = json.loads(done.stdout)
    assert moves == ["ld"] * 8 + ["st"] * 8 and spilled == 0
