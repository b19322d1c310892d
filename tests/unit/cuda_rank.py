"""Ranks over the simulated CUDA: slabs, handles, mapping, plans, a prefetcher each, and compute that compares bytes."""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tests.unit.fake_cuda import FakeCuda, Machine
from tests.unit.rank import TENSORS, fill, flat
from vllm_dwdp.copy_plan import CopyPlan, LayerLayout, build_plan
from vllm_dwdp.placement import place
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher, bind_plan
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.base import Slot
from vllm_dwdp.transport.cuda_copy import CopyOptions, CudaCopyEngine
from vllm_dwdp.transport.cuda_peers import CudaTransport
from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport
from vllm_dwdp.transport.process import ProcessId
from vllm_dwdp.transport.vmm import VmmTransport

LIMIT_S = 30.0


def process_id(number: int) -> ProcessId:
    """Of a made-up process in a namespace of its own, so that nobody looks for it in /proc."""
    return ProcessId(1000 + number, 1, "made up")


def transport_of(
    kind: str, device: FakeCuda, options: CopyOptions | None = None, process: ProcessId | None = None
) -> CudaTransport:
    """Transport `kind`, cupy_ipc or vmm, over a simulated device."""
    if kind == "vmm":
        return VmmTransport(device, device.vmm, options, process)
    return CupyIpcTransport(device, options, process)


@dataclass
class Rank:
    """One rank, its prefetcher not started."""

    device: FakeCuda
    transport: CudaTransport
    engine: CudaCopyEngine
    prefetcher: Prefetcher
    page: CounterPage
    slots: list[Slot]
    plan: CopyPlan
    expected: list[NDArray[np.uint8]]
    rng: random.Random
    compared: int = 0
    wrong: int = 0

    def use(self, layer: int) -> None:
        """The expert compute of `layer`: two kernels, each in pieces, that compare every byte."""
        for _ in range(2):
            self.device.kernel([lambda part=part: self._compare(layer, part) for part in range(3)])  # type: ignore[misc]

    def _compare(self, layer: int, part: int) -> None:
        seen, right = flat(self.slots[self.prefetcher.slot_of(layer)]), self.expected[layer]
        where = slice(part * len(right) // 3, (part + 1) * len(right) // 3)
        self.compared += 1
        self.wrong += not bool((seen[where] == right[where]).all())

    def play(self, layer: int, last: bool) -> None:
        """acquire, compute, release; with `last` aborted before the release."""
        machine = self.device.machine
        machine.wander(5)
        self.prefetcher.acquire(layer)
        self.use(layer)
        machine.wander(5)
        if not last:
            self.prefetcher.release(layer)

    def close(self) -> None:
        self.prefetcher.close(LIMIT_S)
        self.engine.close(LIMIT_S)
        self.page.close()
        del self.prefetcher  # it holds the last events


def start_ranks(
    machine: Machine,
    num_ranks: int,
    experts: int,
    ring: Ring,
    options: CopyOptions,
    slice_bytes: int = 2048,
    kind: str = "cupy_ipc",
) -> list[Rank]:
    """A group on the devices of `machine` in turn, ready to prefetch."""
    placement = place(experts, num_ranks)
    devices = [machine.process(i % len(machine.infos)) for i in range(num_ranks)]
    transports = [transport_of(kind, device, options, process_id(device.number)) for device in devices]
    layout = LayerLayout(placement, TENSORS)
    plans = [build_plan(layout, reader, slice_bytes) for reader in range(num_ranks)]
    slabs = [
        [transport.allocate_slab(layout.slabs[rank].nbytes) for _ in range(ring.num_layers)]
        for rank, transport in enumerate(transports)
    ]
    for rank, own in enumerate(slabs):
        for layer, slab in enumerate(own):
            fill(flat(slab), layout.slabs[rank], layer)
    expected = [np.zeros(plans[0].slot.nbytes, np.uint8) for _ in range(ring.num_layers)]
    for layer, right in enumerate(expected):
        fill(right, plans[0].slot, layer)
    ranks = []
    for rank, (device, transport, plan) in enumerate(zip(devices, transports, plans, strict=True)):
        slots = [transport.allocate_slot(plan.slot.nbytes) for _ in range(ring.used_slots)]
        engine = transport.copy_engine()
        programs = []
        for layer in range(ring.num_layers):
            seen = {
                peer: slabs[rank][layer].address
                if peer == rank
                else transport.map_peer(transports[peer].export_handle(slabs[peer][layer])).address
                for peer in range(num_ranks)
            }
            programs.append(bind_plan(engine, plan, seen, slots[ring.slot_of(layer)].address))
        page = CounterPage.create(rank)
        prefetcher = Prefetcher(ring, engine, programs, page, LIMIT_S)
        rng = random.Random(machine.rng.random())
        ranks.append(Rank(device, transport, engine, prefetcher, page, list(slots), plan, expected, rng))
    return ranks


def close_ranks(ranks: list[Rank]) -> None:
    """In the order that set-up promises: nobody frees before all have unmapped."""
    for rank in ranks:
        rank.close()
    for rank in ranks:
        for peer in list(rank.transport._peers):
            rank.transport.unmap_peer(peer)  # type: ignore[arg-type]
    for rank in ranks:
        rank.transport.close()
        assert rank.device.clean()
