"""What it costs to issue copies from another GPU, by call and by size: needs two GPUs that can read each other, no vLLM.

    python -m ci.bench.copy_calls [--gib 2]

Three ways to read so many GiB in copies of one size: a captured graph of copies, which is what DWDP launches for a layer;
one call of cudaMemcpyBatchAsync on arrays made beforehand; and cudaMemcpyAsync once per copy. "host" is what the call takes,
with the copy stream idle and with it behind a kernel, as it is in a forward; GB/s is the best of some turns.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from typing import Any

from ci.checks.visible import gpus_for

MIB = 1 << 20
SIZES_MIB = (0.25, 1, 4, 16, 64, 256)
ROUNDS = 4
KERNEL_CYCLES = 30_000_000
RELAXED, DEFAULT_KIND, STREAM_ORDER, HIGHEST_PRIORITY = 2, 4, 1, -5
Pointer, Size, Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class Location(ctypes.Structure):
    """cudaMemLocation."""

    _fields_ = [("type", Int), ("id", Int)]


class Attributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = [("order", Int), ("source", Location), ("target", Location), ("flags", ctypes.c_uint)]


class Runtime:
    """The CUDA runtime that torch has loaded; every call checked."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        if torch.cuda.device_count() < 2:
            raise SystemExit(f"two GPUs are needed, {torch.cuda.device_count()} are visible")
        for device in (0, 1):
            torch.zeros(1, device=f"cuda:{device}")
        self._library = ctypes.CDLL("libcudart.so.13")
        self("cudaSetDevice", Int(0))
        self("cudaDeviceEnablePeerAccess", Int(1), Int(0))

    def __call__(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise SystemExit(f"{name} failed with {code}")

    def handle(self, name: str, *arguments: Any) -> Any:
        """The pointer that a call writes to its first argument."""
        made = Pointer()
        self(name, ctypes.byref(made), *arguments)
        return made

    def malloc(self, device: int, nbytes: int) -> int:
        self("cudaSetDevice", Int(device))
        address = self.handle("cudaMalloc", Size(nbytes)).value
        self("cudaMemset", Pointer(address), Int(5 + device), Size(nbytes))
        self("cudaDeviceSynchronize")
        self("cudaSetDevice", Int(0))
        assert address is not None
        return int(address)


class Copies:
    """`nbytes` from `source` to `target` in copies of `size` bytes, ready to be issued by one way."""

    def __init__(self, runtime: Runtime, way: str, target: int, source: int, nbytes: int, size: int) -> None:
        self.runtime, self.way, self.count = runtime, way, nbytes // size
        self.stream = runtime.handle("cudaStreamCreateWithPriority", ctypes.c_uint(1), Int(HIGHEST_PRIORITY))
        places = range(0, self.count * size, size)
        self.each = [
            (Pointer(target + at), Pointer(source + at), Size(size), Int(DEFAULT_KIND), self.stream) for at in places
        ]
        if way == "graph":
            runtime("cudaStreamBeginCapture", self.stream, Int(RELAXED))
            self.one_by_one()
            template = Pointer()
            runtime("cudaStreamEndCapture", self.stream, ctypes.byref(template))
            self.graph = runtime.handle("cudaGraphInstantiate", template, ctypes.c_ulonglong(0))
            runtime("cudaGraphUpload", self.graph, self.stream)
        elif way == "batch":
            self.arrays = (
                (Pointer * self.count)(*[target + at for at in places]),
                (Pointer * self.count)(*[source + at for at in places]),
                (Size * self.count)(*[size] * self.count),
            )
            self.attributes = (Attributes * 1)(Attributes(STREAM_ORDER, Location(0, 0), Location(0, 0), 0))
            self.first = (Size * 1)(0)

    def one_by_one(self) -> None:
        for arguments in self.each:
            self.runtime("cudaMemcpyAsync", *arguments)

    def issue(self) -> None:
        if self.way == "graph":
            self.runtime("cudaGraphLaunch", self.graph, self.stream)
        elif self.way == "batch":
            more = (Size(self.count), self.attributes, self.first, Size(1), self.stream)
            self.runtime("cudaMemcpyBatchAsync", *self.arrays, *more)
        else:
            self.one_by_one()


def measure(copies: Copies, behind: bool) -> tuple[float, float]:
    """(microseconds of the host, seconds of the copies)."""
    runtime, stream = copies.runtime, copies.stream
    begin, end, after = (runtime.handle("cudaEventCreate") for _ in range(3))
    host, took = [], []
    for _ in range(ROUNDS):
        runtime("cudaDeviceSynchronize")
        if behind:
            runtime.torch.cuda._sleep(KERNEL_CYCLES)
            runtime("cudaEventRecord", after, Pointer(runtime.torch.cuda.current_stream(0).cuda_stream))
            runtime("cudaStreamWaitEvent", stream, after, ctypes.c_uint(0))
        runtime("cudaEventRecord", begin, stream)
        started = time.perf_counter()
        copies.issue()
        host.append(time.perf_counter() - started)
        runtime("cudaEventRecord", end, stream)
        runtime("cudaStreamSynchronize", stream)
        spent = ctypes.c_float()
        runtime("cudaEventElapsedTime", ctypes.byref(spent), begin, end)
        took.append(spent.value * 1e-3)
    return statistics.median(host[1:]) * 1e6, min(took[1:])


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=int, default=2)
    options = parser.parse_args()
    gpus_for(parser, without=False, tries="it times copies between two of them")
    nbytes, runtime = options.gib << 30, Runtime()
    source, target = runtime.malloc(1, nbytes), runtime.malloc(0, nbytes)
    print(f"{'way':6} {'MiB':>8} {'copies':>7} {'host us':>9} {'behind a kernel':>16} {'GB/s':>7}")
    for way in ("graph", "batch", "single"):
        for mib in (*SIZES_MIB, nbytes / MIB):
            copies = Copies(runtime, way, target, source, nbytes, int(mib * MIB))
            host, seconds = measure(copies, behind=False)
            waiting, _ = measure(copies, behind=True)
            rate = nbytes / seconds / 1e9
            print(f"{way:6} {mib:8.2f} {copies.count:7} {host:9.1f} {waiting:16.1f} {rate:7.1f}", flush=True)


if __name__ == "__main__":
    main()
