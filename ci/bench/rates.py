"""Measurements for ci/checks/gpu_ipc.py: copy rate, host time of a launch, overlap with compute, exposed waits.

They reach the device through CudaDevice alone, and compute through `Compute`, so that tests run them on a simulated one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from vllm_dwdp.copy_plan import LayerLayout, TensorSpec, build_plan
from vllm_dwdp.placement import place
from vllm_dwdp.prefetch.prefetcher import bind_plan
from vllm_dwdp.transport.base import Copy, Event, Memory, Program, Transport
from vllm_dwdp.transport.cuda_copy import CopyOptions, CudaCopyEngine
from vllm_dwdp.transport.cuda_device import CudaDevice
from vllm_dwdp.transport.cuda_events import NOISE_S

LIMIT_S = 60.0
KIB, MIB = 1 << 10, 1 << 20
NVLINK = 450e9  # bytes per second, one direction
LAUNCH_SHARE = 0.01  # of a pull's time that its launch may take
TURNS = 5


class Row(NamedTuple):
    """One line of the table; ok is None where there is nothing to fail."""

    part: str
    name: str
    value: float
    unit: str
    ok: bool | None = None
    note: str = ""


class Layer(NamedTuple):
    """The pull of one MoE layer."""

    experts: int = 256
    ranks: int = 4
    hidden: int = 7168
    intermediate: int = 2048

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        one = self.hidden * self.intermediate  # FP8
        return (TensorSpec("w13", 2 * one), TensorSpec("w2", one))

    @property
    def share_bytes(self) -> int:
        """Of the slab of one rank."""
        return -(-self.experts // self.ranks) * sum(spec.row_bytes for spec in self.tensors)


class Compute(Protocol):
    """What only a real device, or a simulated one, can do."""

    def sleep(self, stream: int, seconds: float) -> None:
        """Keep `stream` busy for about that long."""

    def matmul(self) -> None:
        """One large matrix product on the compute stream."""


def timed(device: CudaDevice, stream: int, work: Callable[[], object]) -> float:
    """Seconds that `stream` took from before `work` to after it; returns when it is done."""
    begin, end = device.make_event(timing=True), device.make_event(timing=True)
    device.record(begin, stream)
    work()
    device.record(end, stream)
    settle(device, end)
    seconds = device.elapsed_s(begin, end)
    device.destroy_event(begin)
    device.destroy_event(end)
    return seconds


def settle(device: CudaDevice, event: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not device.query(event):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the device was not done after {LIMIT_S} s")
        time.sleep(20e-6)


def cut(dst: int, src: int, nbytes: int, slice_bytes: int) -> list[Copy]:
    return [Copy(dst + at, src + at, min(slice_bytes, nbytes - at)) for at in range(0, nbytes, slice_bytes)]


def rates(
    device: CudaDevice,
    kind: str,
    source: Memory,
    slot: Memory,
    sizes: Sequence[int],
    rounds: int = 3,
) -> list[Row]:
    """GB/s by slice size, graphs against single copies at one point."""
    rows = []
    for size, graphs in [*((size, True) for size in sizes), (MIB, False)]:
        engine = CudaCopyEngine(device, CopyOptions(graphs, LIMIT_S))
        program = engine.bind(cut(slot.address, source.address, source.nbytes, size))
        seconds = min(timed(device, engine.stream, partial(engine.submit, program)) for _ in range(rounds + 1))
        engine.close(LIMIT_S)
        how = f"{size // KIB} KiB, 1 in flight" + ("" if graphs else ", without a graph")
        rows.append(Row("rate", f"{kind}, {how}", source.nbytes / seconds / 1e9, "GB/s"))
    return rows


def same_bytes(device: CudaDevice, source: Memory, slot: Memory) -> Row:
    """What the last of the copies left: to be asked once after `rates`."""
    wrong = int((source.tensor().to(slot.tensor().device) != slot.tensor()[: source.nbytes]).sum())
    return Row("rate", "wrong bytes", wrong, "bytes", wrong == 0)


def launch_times(
    device: CudaDevice, transport: Transport, source: Memory, layer: Layer, sizes: Sequence[int]
) -> list[Row]:
    """Host time to submit one layer's graph, against its pull at NVLINK, for slices of these sizes and for whole ranges,
    the default, which must be below LAUNCH_SHARE. source: stands for the slabs of all ranks."""
    layout, rows = LayerLayout(place(layer.experts, layer.ranks), layer.tensors), []
    slot = transport.allocate_slot(layout.slot(0).nbytes)
    for size in (*sizes, None):
        engine = CudaCopyEngine(device, CopyOptions(timeout_s=LIMIT_S))
        plan = build_plan(layout, 0, size)
        free, begin = device.memory().free, time.perf_counter()
        program = bind_plan(engine, plan, dict.fromkeys(range(layer.ranks), source.address), slot.address)
        bound = time.perf_counter() - begin
        taken = free - device.memory().free
        spent = []
        for _ in range(6):
            after = engine.record()
            begin = time.perf_counter()
            event = engine.submit(program, after)
            spent.append(time.perf_counter() - begin)
            engine.finish(event, LIMIT_S)
        host, pull = statistics.median(spent[1:]), program.pulled_bytes / NVLINK
        note = (
            f"{program.copies} copies, bound in {bound * 1e3:.0f} ms, {taken / MIB:.1f} MiB, pull {pull * 1e3:.2f} ms"
        )
        ok = host < LAUNCH_SHARE * pull if size is None else None
        name = f"default, {plan.pulls[0].nbytes // MIB} MiB" if size is None else f"{size // MIB} MiB"
        rows.append(Row("launch", f"{name}: host time", host * 1e6, "us", None, note))
        rows.append(Row("launch", f"{name}: of the pull at 450 GB/s", 100 * host / pull, "%", ok))
        engine.close(LIMIT_S)
    return rows


def overlap(
    device: CudaDevice, compute: Compute, source: Memory, slot: Memory, sizes: Sequence[int], products: int = 40
) -> list[Row]:
    """How much slower matrix products are while pulls from pinned memory run beside them, by slice size.

    Products are queued first and pulls then follow each other until the last product is done: the host may block in the
    launch of a graph of many copies, so that pulls queued first would end before the products do.
    """

    def work() -> None:
        for _ in range(products):
            compute.matmul()

    stream, rows = device.compute_stream(), []
    for size in (*sizes, source.nbytes):
        engine = CudaCopyEngine(device, CopyOptions(timeout_s=LIMIT_S))
        program = engine.bind(cut(slot.address, source.address, source.nbytes, size))
        pull = min(timed(device, engine.stream, partial(engine.submit, program)) for _ in range(2))
        alone, beside, pulled = [], [], 0
        for _ in range(TURNS):
            alone.append(timed(device, stream, work))
            begin, end = device.make_event(timing=True), device.make_event(timing=True)
            device.record(begin, stream)
            work()
            device.record(end, stream)
            under_way: list[Event] = []
            while not device.query(end):
                under_way = [event for event in under_way if not engine.ready(event)]
                if len(under_way) < 2:
                    under_way.append(engine.submit(program))
                    pulled += 1
            beside.append(device.elapsed_s(begin, end))
            for raw in (begin, end):
                device.destroy_event(raw)
            for event in under_way:
                engine.finish(event, LIMIT_S)
        slower = statistics.median(beside) / statistics.median(alone)
        name = "one copy" if size == source.nbytes else f"{size // KIB} KiB"
        note = f"pull {source.nbytes / pull / 1e9:.1f} GB/s, {pulled} pulls beside {TURNS} x {products} products"
        rows.append(Row("overlap", f"{name}: slow-down", 100 * (slower - 1), "%", slower < 1.8, note))
        engine.close(LIMIT_S)
    return rows


def merge(
    device: CudaDevice, transport: Transport, source: Memory, layer: Layer, held: int, slice_bytes: int | None
) -> list[Row]:
    """Milliseconds to fill a slot for one layer: with all experts (contiguous view) and with the missing ones (split).

    The merge copy alone is what the split view saves. source: stands for the peers' slabs. held: experts of the rank.
    """
    layout, rows, times = LayerLayout(place(layer.experts, layer.ranks, held), layer.tensors), [], {}
    own = transport.allocate_slot(layout.slabs[0].nbytes)
    where = {rank: source.address for rank in range(1, layer.ranks)} | {0: own.address}
    for view in ("contiguous", "split"):
        plan = build_plan(layout, 0, slice_bytes, split=view == "split")
        slot = transport.allocate_slot(plan.slot.nbytes)
        engine = CudaCopyEngine(device, CopyOptions(timeout_s=LIMIT_S))
        programs = {view: bind_plan(engine, plan, where, slot.address)}
        if plan.local:
            programs["merge copy"] = engine.bind(
                (),
                [
                    Copy(slot.address + item.dst_offset, own.address + item.src_offset, item.nbytes)
                    for item in plan.local
                ],
            )
        for name, program in programs.items():
            spent = [timed(device, engine.stream, partial(engine.submit, program)) for _ in range(TURNS + 1)][1:]
            times[name] = statistics.median(spent)
            moved = program.pulled_bytes + program.merged_bytes
            note = f"{moved / 1e6:.0f} MB, {moved / times[name] / 1e9:.0f} GB/s, slot {plan.slot.nbytes / 1e6:.0f} MB"
            rows.append(Row("merge", f"{held} of {layer.experts} held: {name}", times[name] * 1e3, "ms", None, note))
        engine.close(LIMIT_S)
    ratio = times["contiguous"] / times["split"]
    # Rates of the link vary by some percent; the split view does strictly less.
    rows.append(Row("merge", f"{held} of {layer.experts} held: contiguous / split", ratio, "", ratio > 0.97))
    return rows


def exposed(device: CudaDevice, compute: Compute, source: Memory, slot: Memory, delays: Sequence[float]) -> list[Row]:
    """What the engine says compute waited, against a delay put before the copy; and nothing where compute hides it."""
    rows = []
    engine = CudaCopyEngine(device, CopyOptions(timeout_s=LIMIT_S))
    program: Program = engine.bind([Copy(slot.address, source.address, 256)])

    def told(delay: float, hidden: float) -> tuple[float, float]:
        """(from compute's arrival at the wait until it went on, what the engine tells)."""
        stream = device.compute_stream()
        begin, end = device.make_event(timing=True), device.make_event(timing=True)
        compute.sleep(engine.stream, delay)
        event = engine.submit(program)
        if hidden:
            compute.sleep(stream, hidden)
        # Not where the delay begins: until compute comes to its wait, the delay is no wait.
        device.record(begin, stream)
        engine.wait(event, LIMIT_S)
        # Of compute, and not the copy's end, which the engine takes: so a wait that is none shows.
        device.record(end, stream)
        assert not engine.take_exposed().waits, "an earlier wait was told late"
        engine.finish(engine.record(), LIMIT_S)
        settle(device, end)
        found = engine.take_exposed().seconds
        injected = device.elapsed_s(begin, end)
        for raw in (begin, end):
            device.destroy_event(raw)
        return injected, found

    told(delays[0], 0.0)
    for delay in delays:
        injected, found = told(delay, 0.0)
        # Some microseconds of host lie between the two begins.
        ok = abs(found - injected) < 0.05 * injected + 50e-6
        rows.append(Row("exposed", f"wait of {injected * 1e3:.3f} ms: told", found * 1e3, "ms", ok))
    _, found = told(delays[0], 4 * delays[-1])
    rows.append(Row("exposed", "hidden delay: told", found * 1e3, "ms", found <= 4 * NOISE_S))
    engine.close(LIMIT_S)
    return rows
