"""Cost of the data path on this machine, without vLLM: `.venv/bin/python -m ci.bench.data_path`.

Prints the copy engine against one plain memmove per peer of the same bytes on the same core (goal: a ratio of at least
0.9); a copy while Python runs on another core, against one that goes slice by slice; and what acquire and release cost
when the data is there (goal: below 20 microseconds). Both sides of a ratio alternate in one run; medians.
"""

import ctypes
import os
import statistics
import time
from collections.abc import Callable

from vllm_dwdp.copy_plan import LayerLayout, TensorSpec, build_plan
from vllm_dwdp.placement import place
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.base import Copy
from vllm_dwdp.transport.shm import ShmTransport
from vllm_dwdp.transport.shm_copy import ShmCopyEngine, ShmProgram

LIMIT_S = 60.0
MIB = 1 << 20
NUM_EXPERTS, NUM_RANKS = 12, 3  # 8 experts come from two peers
TENSORS = (TensorSpec("w13", 2 * MIB), TensorSpec("w2", MIB))
REPETITIONS = 31
QUEUED = 8  # layers submitted at once, so that the copy thread and not its wake-up is measured
PATH_ROUNDS = 4000


def seconds(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def medians(*actions: Callable[[], None]) -> list[float]:
    """Median seconds of each action, all alternating."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(REPETITIONS):
        for action, found in zip(actions, times, strict=True):
            found.append(seconds(action))
    return [statistics.median(found) for found in times]


def bench_copy(transport: ShmTransport, cores: list[int]) -> None:
    layout = LayerLayout(place(NUM_EXPERTS, NUM_RANKS), TENSORS)
    plan = build_plan(layout, 0, MIB)
    peers = [transport.map_peer(transport.export_handle(transport.allocate_slab(slab.nbytes))) for slab in layout.slabs]
    slot = transport.allocate_slot(plan.slot.nbytes)
    pulls = [
        Copy(slot.address + item.dst_offset, peers[item.source].address + item.src_offset, item.nbytes)
        for item in plan.pulls
    ]
    engine = transport.copy_engine()
    stepping = ShmCopyEngine(LIMIT_S, cores[-1:], before_copy=lambda _: None)
    share = layout.slabs[1].nbytes

    def plain() -> None:
        for _ in range(QUEUED):
            for turn in (0, 1):
                ctypes.memmove(slot.address + turn * share, peers[turn + 1].address, share)

    program = engine.bind(pulls)
    slices = stepping.bind(pulls)

    def queued() -> None:
        for event in [engine.submit(program) for _ in range(QUEUED)]:
            engine.wait(event, LIMIT_S)

    mib = plan.pulled_bytes / MIB
    print(f"a layer: {mib:.0f} MiB from {NUM_RANKS - 1} peers in {len(pulls)} slices; {QUEUED} layers queued")
    base, found = medians(plain, queued)
    rates = [f"{QUEUED * mib / 1024 / took:.1f} GiB/s" for took in (base, found)]
    print(f"plain {rates[0]}, engine {rates[1]}, ratio {base / found:.2f}; goal >= 0.9")
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[:1])
        times = [beside_python(engine, program), beside_python(stepping, slices)]
        print(f"beside Python on another core: engine {times[0]:.1f} ms, slice by slice {times[1]:.1f} ms")
    for used in (engine, stepping):
        used.close(LIMIT_S)


def beside_python(engine: ShmCopyEngine, program: ShmProgram) -> float:
    """Median milliseconds of a copy while the calling thread runs Python."""
    times = []
    for _ in range(5):
        event = engine.submit(program)
        while not event.done:
            pass
        times.append((event.end_ns - event.begin_ns) / 1e6)
    return statistics.median(times)


def bench_path(transport: ShmTransport) -> None:
    """acquire + release of layers whose copies are done: tiny ones, that end before the next acquire."""
    ring = Ring(4, 2)
    engine = transport.copy_engine()
    slot = transport.allocate_slot(8192)
    programs = [engine.bind([Copy(slot.address, slot.address + 4096, 64)]) for _ in range(4)]
    prefetcher = Prefetcher(ring, engine, programs, CounterPage.create(), LIMIT_S)
    prefetcher.start()
    time.sleep(0.1)
    pairs = []
    for round_ in range(PATH_ROUNDS):
        layer = round_ % 4
        begin = time.perf_counter()
        prefetcher.acquire(layer)
        prefetcher.release(layer)
        pairs.append(time.perf_counter() - begin)
        while not engine.ready(prefetcher._slots[layer % 2].copied):  # type: ignore[arg-type]
            time.sleep(0)
    pairs.sort()
    middle, high = statistics.median(pairs) * 1e6, pairs[int(0.95 * len(pairs))] * 1e6
    print(f"acquire + release, data there: median {middle:.1f} us, 95th percentile {high:.1f} us; goal < 20 us")
    prefetcher.close(LIMIT_S)
    engine.close(LIMIT_S)


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    transport = ShmTransport(LIMIT_S, cores[-1:])
    # Not two cores in turn: the memory would move between their caches, at the cost of whichever copies first.
    os.sched_setaffinity(0, cores[-1:])
    bench_copy(transport, cores)
    os.sched_setaffinity(0, cores[:1])
    bench_path(transport)
    transport.close()


if __name__ == "__main__":
    main()
