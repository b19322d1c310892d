"""What a layer's acquire and release cost the host of a GPU: calls by name, and microseconds; no vLLM.

    python -m ci.bench.layer_calls [--simulated] [--json FILE]

One GPU is enough: the copies lie within it, since their host side does not depend on where the source is. `--simulated`
counts on a machine without a GPU, on the simulated device of the tests, whose times say nothing and are not shown.

hidden: copies are done before compute wants them, and the host knows. ahead: the host is ahead of the device, so that
every layer waits on the device. own slot: as many slots as layers, so that each is pulled once. direct: missing experts
are read where they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ci.checks.visible import gpus_for
from vllm_dwdp.layers.views.direct import DirectGate
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.base import Copy
from vllm_dwdp.transport.cuda_copy import CopyOptions, CudaCopyEngine

LAYERS, SLOTS, ROUNDS, WARM = 48, 2, 12, 4
FEW, MANY = 1, 1024
#: Torch answers these; all others are calls of CUDA.
OF_TORCH = ("compute_stream",)
AHEAD_CYCLES = 60_000_000


class Counted:
    """A device whose calls are counted."""

    def __init__(self, device: Any) -> None:
        self.device, self.calls = device, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.device, name)
        if not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            return found(*arguments)

        return call


class Module:
    """What a `DirectGate` asks of a layer."""

    direct = False

    def dwdp_compute_direct(self, direct: bool) -> None:
        self.direct = direct


class Simulated:
    """The device of the tests; the host is ahead of it while it is frozen."""

    def __init__(self) -> None:
        from tests.unit.fake_cuda import Machine

        self.machine = Machine()
        self.device: Any = self.machine.process()

    def begin(self, ahead: bool) -> None:
        self.machine.frozen = ahead

    def settle(self) -> None:
        if not self.machine.frozen:
            self.machine.drain()

    def end(self) -> None:
        self.machine.frozen = False
        self.machine.drain()


class Gpu:
    """The first GPU; the host is ahead of it behind a kernel that takes long."""

    def __init__(self) -> None:
        import torch

        from vllm_dwdp.transport.cuda_cupy import CupyDevice

        self.torch, self.device, self.ahead = torch, CupyDevice(0), False

    def begin(self, ahead: bool) -> None:
        self.ahead = ahead
        if ahead:
            self.torch.cuda._sleep(AHEAD_CYCLES)

    def settle(self) -> None:
        if not self.ahead:
            self.torch.cuda.synchronize()

    def end(self) -> None:
        self.torch.cuda.synchronize()


def measure(place: Simulated | Gpu, case: str, count: bool) -> tuple[dict[str, float], float]:
    """(calls of a layer by name, its microseconds on the host)."""
    nbytes, device = 1 << 16, place.device
    counted = Counted(device) if count else None
    source, target = device.malloc(LAYERS * nbytes), device.malloc(LAYERS * nbytes)
    engine = CudaCopyEngine(counted or device, CopyOptions())  # type: ignore[arg-type]
    ring = Ring(LAYERS, LAYERS if case == "own slot" else SLOTS)
    bind = [
        engine.bind([Copy(target + ring.slot_of(layer) * nbytes, source + layer * nbytes, nbytes)])
        for layer in range(LAYERS)
    ]
    page = CounterPage.create()
    prefetcher = Prefetcher(ring, engine, bind, page, 60.0)
    gate = DirectGate(prefetcher, Module(), FEW)
    tokens = FEW if case == "direct" else MANY
    prefetcher.start()
    place.end()
    calls, spent = Counter[str](), []
    for step in range(ROUNDS):
        place.begin(case == "ahead")
        before, seconds = Counter(counted.calls if counted else ()), 0.0
        for layer in range(LAYERS):
            place.settle()
            started = time.perf_counter()
            gate.acquire(layer, tokens)
            gate.release(layer, tokens)
            seconds += time.perf_counter() - started
        if step >= WARM:
            calls.update(Counter(counted.calls if counted else ()) - before)
            spent.append(seconds / LAYERS)
        place.end()
    prefetcher.close(60.0)
    engine.close(60.0)
    page.close()
    device.free(source)
    device.free(target)
    layers = LAYERS * (ROUNDS - WARM)
    return {name: number / layers for name, number in sorted(calls.items())}, statistics.median(spent) * 1e6


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", action="store_true", help="count calls, without a GPU and without times")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    gpus_for(parser, options.simulated, "--simulated counts without one")
    make: Callable[[], Simulated | Gpu] = Simulated if options.simulated else Gpu
    rows = []
    print(f"{'case':9} {'CUDA calls':>10} {'of torch':>8} {'host us':>8}  by name")
    for case in ("hidden", "ahead", "own slot", "direct"):
        with nullcontext(make()) as place:
            calls, _ = measure(place, case, count=True)
            # Counting costs time, so that it is measured without.
            spent = None if options.simulated else measure(place, case, count=False)[1]
        of_torch = sum(calls.get(name, 0.0) for name in OF_TORCH)
        total = sum(calls.values()) - of_torch
        rows.append({"case": case, "cuda_calls": total, "of_torch": of_torch, "host_us": spent, "calls": calls})
        shown = "-" if spent is None else f"{spent:.1f}"
        names = ", ".join(f"{name} {number:.2f}" for name, number in calls.items())
        print(f"{case:9} {total:10.2f} {of_torch:8.2f} {shown:>8}  {names}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
