"""Ranks in processes of their own, for gpu_ipc.py: they share slabs, prefetch, and compare every acquired byte.

With transport "shm" the same code runs on a machine without a GPU.
"""

import random
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from vllm_dwdp.copy_plan import LayerLayout, Layout, TensorSpec, build_plan
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.placement import place
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher, bind_plan
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.base import Handle, Transport
from vllm_dwdp.transport.cuda_bindings import BindingsVmm
from vllm_dwdp.transport.cuda_copy import CopyOptions
from vllm_dwdp.transport.cuda_cupy import CupyDevice
from vllm_dwdp.transport.cuda_pinned import PinnedTransport
from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport
from vllm_dwdp.transport.devices import device_of_rank
from vllm_dwdp.transport.shm import ShmTransport
from vllm_dwdp.transport.vmm import VmmTransport

LIMIT_S = 60.0
EXPERTS, LAYERS, SLOTS = 8, 5, 2
#: Direct forwards: whole, with layers skipped and repeated, and none as of a dense drafter.
ORDERS = (tuple(range(LAYERS)), (0, 1, 2), (0, 2, 4), (4, 1), (0, 1, 2, 0), (3, 3, 1), ())
TENSORS = (TensorSpec("w13", 96 << 10), TensorSpec("w2", 48 << 10), TensorSpec("scale", 12))


class Setting(NamedTuple):
    transport: str  # cupy_ipc, vmm, cuda_pinned or shm
    num_ranks: int
    slice_bytes: int = 64 << 10


class Played(NamedTuple):
    wrong: int  # bytes
    acquired: int
    exposed_s: float


def make_transport(name: str, rank: int, num_ranks: int, options: CopyOptions, keep: bool = False) -> Transport:
    """On the device of `rank`, where ranks share devices as evenly as there are. keep: what peers map, for others (shm and
    vmm)."""
    if name == "shm":
        return ShmTransport(LIMIT_S, keep_files=keep)
    import torch

    count = torch.cuda.device_count()
    per_device = -(-num_ranks // max(1, count))
    visible = CupyDevice(0).devices()
    device = CupyDevice(device_of_rank(rank, num_ranks, per_device, visible).index)
    return transport_on(device, name, options, keep)


def transport_on(device: CupyDevice, name: str, options: CopyOptions, keep: bool = False) -> Transport:
    """One of the transports of GPUs."""
    if name == "vmm":
        return VmmTransport(device, BindingsVmm(device.index), options, keep_descriptors=keep)
    kind = CupyIpcTransport if name == "cupy_ipc" else PinnedTransport
    return kind(device, options)


def weights(layout: Layout, layer: int) -> Any:
    """uint8 [layout.nbytes]: what everybody agrees on for the experts of a layer."""
    import torch

    made = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for number, spec in enumerate(layout.tensors):
        for expert in layout.experts:
            seeded = torch.Generator().manual_seed(1_000_000 * layer + 1000 * number + expert)
            at = layout.offset(spec.name, expert)
            made[at : at + spec.row_bytes] = torch.randint(
                0, 256, (spec.row_bytes,), dtype=torch.uint8, generator=seeded
            )
    return made


class Player:
    """One rank's prefetcher, and compute that compares what it acquires."""

    def __init__(self, pipe: Connection, rank: int, setting: Setting) -> None:
        import torch

        self.torch, self.rng = torch, random.Random(rank)
        self.transport = make_transport(setting.transport, rank, setting.num_ranks, CopyOptions())
        placement = place(EXPERTS, setting.num_ranks)
        layout = LayerLayout(placement, TENSORS)
        plan = build_plan(layout, rank, setting.slice_bytes)
        own = [self.transport.allocate_slab(layout.slabs[rank].nbytes) for _ in range(LAYERS)]
        for layer, slab in enumerate(own):
            slab.tensor().copy_(weights(layout.slabs[rank], layer))
        self.on_gpu = setting.transport != "shm"
        if not self.on_gpu:
            torch.set_num_threads(1)  # threads of several ranks spin for each other's cores
        if self.on_gpu:
            torch.cuda.synchronize()
        pipe.send([self.transport.export_handle(slab) for slab in own])
        handles: dict[int, list[Handle]] = pipe.recv()
        self.ring = Ring(LAYERS, SLOTS)
        slots = [self.transport.allocate_slot(plan.slot.nbytes) for _ in range(SLOTS)]
        self.seen = [slot.tensor() for slot in slots]
        where = self.seen[0].device
        self.expected = [weights(plan.slot, layer).to(where) for layer in range(LAYERS)]
        self.wrong = torch.zeros((), dtype=torch.int64, device=where)
        self.engine = self.transport.copy_engine()
        self.peers = []
        programs = []
        self.direct_rows: list[list[tuple[Any, Any]]] = []
        for layer in range(LAYERS):
            mapped = {peer: self.transport.map_peer(handles[peer][layer]) for peer in handles if peer != rank}
            self.peers += mapped.values()
            addresses = {peer: slab.address for peer, slab in mapped.items()} | {rank: own[layer].address}
            programs.append(bind_plan(self.engine, plan, addresses, slots[self.ring.slot_of(layer)].address))
            slabs = {peer: slab.tensor() for peer, slab in mapped.items()} | {rank: own[layer].tensor()}
            rows = []
            for run in placement.runs(rank):
                for spec in TENSORS:
                    begin = layout.slabs[run.owner].offset(spec.name, run.first)
                    right = plan.slot.offset(spec.name, run.first)
                    nbytes = run.length * spec.row_bytes
                    rows.append(
                        (slabs[run.owner][begin : begin + nbytes], self.expected[layer][right : right + nbytes])
                    )
            self.direct_rows.append(rows)
        self.page = CounterPage.create(rank)
        self.prefetcher = Prefetcher(self.ring, self.engine, programs, self.page, LIMIT_S)
        self.prefetcher.start()

    def use(self, layer: int) -> None:
        """Compare the slot at the beginning and at the end of a compute of random length."""
        slot, right = self.seen[self.prefetcher.slot_of(layer)], self.expected[layer]
        for _ in range(2):
            self.wrong += (slot != right).sum()
            if self.on_gpu and self.rng.random() < 0.5 and not self.torch.cuda.is_current_stream_capturing():
                self.torch.cuda._sleep(self.rng.randrange(1, 400_000))

    def play(self, acquires: int, aborts: bool = True) -> None:
        """Whole forwards until at least `acquires` acquires, some aborted, with delays on the host too."""
        done = 0
        while done < acquires:
            last = self.rng.randrange(LAYERS) if aborts and self.rng.random() < 0.1 else None
            for layer in range(LAYERS):
                self.prefetcher.acquire(layer)
                self.use(layer)
                done += 1
                if layer == last:
                    break
                self.prefetcher.release(layer)
                if self.rng.random() < 0.2:
                    time.sleep(self.rng.random() * 1e-3)

    def read(self, layer: int) -> None:
        """Compare every expert where it is, in the own slab or in its owner's, as a forward of few tokens reads it."""
        for source, right in self.direct_rows[layer]:
            self.wrong += (source != right).sum()

    def direct(self, acquires: int) -> None:
        """Forwards that read directly, from CUDA graphs or launched one by one, between ones that pull."""
        self.play(LAYERS, aborts=False)
        graphs = [self.capture(order) for order in ORDERS] if self.on_gpu else [None] * len(ORDERS)
        done, number = 0, 0
        while done < acquires:
            chosen, pulls = self.rng.randrange(len(ORDERS)), self.page.fields.pulls
            if self.rng.random() < 0.2:  # pulls, and may be aborted
                self.play(1)
            else:
                if (graph := graphs[chosen]) is None or self.rng.random() < 0.3:
                    self.read_all(ORDERS[chosen])
                else:
                    graph.replay()
                # A direct forward that moved the ring is as wrong as a byte.
                self.wrong += self.page.fields.pulls - pulls
            number += 1
            done += max(1, len(ORDERS[chosen]))
            if self.on_gpu and number % 50 == 0:
                self.refused_capture()
        self.synchronize()
        self.play(2 * LAYERS, aborts=False)

    def read_all(self, order: Sequence[int]) -> None:
        """A forward of these layers, directly."""
        for layer in order:
            self.read(layer)

    def capture(self, order: Sequence[int]) -> Any:
        """The graph of a forward of these layers, directly."""
        self.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            self.wrong += 0  # torch warns of a graph without nodes
            self.read_all(order)
        return graph

    def refused_capture(self) -> None:
        """Pulling in a capture is refused, and leaves everything as it is."""
        self.synchronize()
        with self.torch.cuda.graph(self.torch.cuda.CUDAGraph()):
            self.wrong += 0
            try:
                self.prefetcher.acquire(self.rng.randrange(LAYERS))
            except DwdpError:
                return
        raise AssertionError("a layer was acquired while a CUDA graph was captured")

    def synchronize(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def churn(self, mib: int) -> None:
        """Allocate and write memory, which must not be a dead owner's."""
        made = [self.torch.full((1 << 20,), 0xAA, dtype=self.torch.uint8, device=self.wrong.device) for _ in range(mib)]
        self.wrong += sum(int((block != 0xAA).sum()) for block in made[:1])

    def result(self) -> Played:
        page = self.page.fields
        return Played(int(self.wrong), page.layers, page.exposed_wait_ns * 1e-9)


def run_rank(pipe: Connection, rank: int, setting: Setting) -> None:
    """A rank that does what it is sent: ("play", "direct" or "churn", a number), then "unmap", then "end"."""
    player = Player(pipe, rank, setting)
    while (order := pipe.recv()) not in ("unmap", "end"):
        getattr(player, order[0])(order[1])
        pipe.send(player.result())
    player.prefetcher.close(LIMIT_S)
    player.engine.close(LIMIT_S)
    player.direct_rows.clear()
    for peer in player.peers:
        player.transport.unmap_peer(peer)
    pipe.send("unmapped")
    pipe.recv()
    player.transport.close()


def own_slab(pipe: Connection, transport: str, nbytes: int) -> None:
    """An owner of one slab, on the second device where there are two; it ends when its pipe is closed."""
    made = make_transport(transport, 1, 2, CopyOptions())
    slab = made.allocate_slab(nbytes)
    pipe.send(made.export_handle(slab))
    try:
        pipe.recv()
    except EOFError:
        made.close()
