"""The experts of one rank's model, shared with its group: slabs, peers, views, ring and counters in one object."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.first_use import seal, unused
from vllm_dwdp.layers.hits import HitCounts
from vllm_dwdp.layers.read_stats import READ
from vllm_dwdp.layers.slabs import map_peers, move_to_slabs, replicate_small
from vllm_dwdp.layers.split import attach_split, why_not_split
from vllm_dwdp.layers.views import (
    InplaceGate,
    attach_contiguous,
    attach_inplace,
    fits_pages,
    refuse_inplace,
    slot_bytes,
)
from vllm_dwdp.layers.window import Window, copy_rate, estimate, product_rate
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher, TraceEvent
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.base import Memory, Program, Transport
from vllm_dwdp.transport.handles_json import handle_to_json
from vllm_dwdp.transport.shm import ShmTransport

if TYPE_CHECKING:
    from vllm_dwdp.engine.launch import DwdpLaunch
    from vllm_dwdp.engine.rendezvous import Rendezvous

_CLOSE_TIMEOUT_S = 5.0


def make_transport(build: ModelBuild, cores: tuple[int, ...]) -> Transport:
    """The transport for this platform; raises DwdpError for one that is not there."""
    name = build.config.transport
    if build.on_cpu and name in ("auto", "shm"):
        return ShmTransport(build.config.timeout_s, cores)
    if not build.on_cpu and name in ("auto", "cupy_ipc", "cuda_pinned"):
        import torch

        from vllm_dwdp.transport.cuda_copy import CopyOptions
        from vllm_dwdp.transport.cuda_device import open_device
        from vllm_dwdp.transport.cuda_pinned import MirroredTransport
        from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport

        options = CopyOptions(build.config.in_flight, timeout_s=build.config.timeout_s)
        device = open_device(torch.cuda.current_device())
        return MirroredTransport(device, options) if name == "cuda_pinned" else CupyIpcTransport(device, options)
    raise DwdpError(
        f"transport {name!r} is not available {'on CPU: use shm' if build.on_cpu else 'on GPUs: use cupy_ipc'}"
    )


class ExpertSharing:
    """Set up once, after vLLM has loaded and processed this rank's share; then only read by the layers' gates.

    Raises:
        DwdpError: memory is short, or a layer cannot be shared.
        DwdpTimeout, PeerLost: a peer did not come, or failed.
    """

    def __init__(self, build: ModelBuild, rendezvous: Rendezvous, launch: DwdpLaunch) -> None:
        self.build = build
        build.shared = True
        group = launch.group_of(rendezvous.rank)
        self.transport = make_transport(build, launch.cores)
        self.slots: list[Memory] = []
        self.trace: list[TraceEvent] = []
        self.prefetcher: Prefetcher | None = None
        self.refilled: list[Program] = []
        self._closing = contextlib.ExitStack()
        self._closing.callback(self.transport.close)
        try:
            self.layers = move_to_slabs(build, self.transport)
            map_peers(self.layers, build, self.transport, rendezvous, group)
            self.replicated_bytes = sum(replicate_small(layer, build.rank) for layer in self.layers)
            self.counters = CounterPage.create(rank=group[build.rank])
            self._closing.callback(self.counters.close)
            self._attach_views()
            device = self.layers[0].fetched[0].parameter.device
            self.hits = HitCounts(build.layers, build.rank, device) if build.config.hits else None
            slots = sum(slot.nbytes for slot in self.slots)
            self.counters.describe(self.view, self.experts_held, self.slab_bytes, slots)
            rendezvous.put("counters", handle_to_json(self.counters.handle()))
            # In-place ranges open the owners' files once more: no owner may leave before all are mapped.
            rendezvous.gather("mapped", True, group)
        except BaseException:
            self.close()
            raise

    def _attach_views(self) -> None:
        rank = self.build.rank
        if not self.build.on_cpu:
            self.view = self._gpu_view()
            self._attach_ring()
            return
        view = self.build.config.weight_view
        # One view for the whole model: a single layer off the pages takes the others along.
        misfit = next((layer for layer in self.layers if not fits_pages(layer, rank)), None)
        if view == "contiguous" or (view == "auto" and misfit is not None):
            self.view = "contiguous"
            self._attach_ring()
            return
        if misfit is not None:
            raise refuse_inplace(misfit, misfit.fetched)
        self.view = "inplace"
        self._attach_pages()

    def _gpu_view(self) -> str:
        view = self.build.config.weight_view
        if view != "auto":
            return view
        # One view for the whole model, as on CPU.
        return "contiguous" if any(why_not_split(layer) for layer in self.layers) else "split"

    def _attach_pages(self) -> None:
        assert isinstance(self.transport, ShmTransport)
        gate = InplaceGate(self.counters)
        for i, layer in enumerate(self.layers):
            attach_inplace(layer, self.build.rank, self.transport)
            # The range has mappings of its own.
            for peer in layer.peers.values():
                self.transport.unmap_peer(peer)
            layer.build.module.dwdp_attach(gate, i)

    def _attach_ring(self) -> None:
        config, rank = self.build.config, self.build.rank
        ring = Ring(len(self.layers), config.num_slots)
        nbytes = slot_bytes(self.layers, rank, split=self.view == "split")
        self.slots = [self.transport.allocate_slot(nbytes) for _ in range(ring.used_slots)]
        engine = self.transport.copy_engine()
        self._closing.callback(engine.close, _CLOSE_TIMEOUT_S)
        self.engine = engine
        slice_bytes = config.resolve_slice_bytes(self.build.on_cpu)
        attach = attach_split if self.view == "split" else attach_contiguous
        programs = [
            attach(layer, rank, self.slots[ring.slot_of(i)], engine, slice_bytes) for i, layer in enumerate(self.layers)
        ]
        trace = self.trace if config.trace else None
        self.prefetcher = Prefetcher(ring, engine, programs, self.counters, config.timeout_s, trace)
        # A layer with a slot of its own is pulled once and stays.
        self.refilled = [program for i, program in enumerate(programs) if ring.next_layer(i) is not None]
        runners = self.build.outer_runners
        for i, layer in enumerate(self.layers):
            layer.build.module.dwdp_attach(self.prefetcher, i, runners.get(layer.build.name))

    def start(self) -> None:
        """Begin to prefetch; the model may run."""
        if self.prefetcher is not None:
            self.prefetcher.start()

    def unused(self) -> list[str]:
        """Names of the layers that were never acquired."""
        return [layer.build.name for layer in unused(self.layers)]

    def seal_unused(self) -> None:
        """To be called after vLLM's warm-up: see first_use.py."""
        if self.view != "inplace":
            seal(unused(self.layers), self.build.on_cpu)

    def window(self, tokens: int) -> Window | None:
        """Whether the pull of a forward of `tokens` tokens can be hidden; None where nothing is pulled.

        To be asked before the first forward: it fills slots.
        """
        if not self.refilled:
            return None
        tensors = [(layer.build.module, tensor) for layer in self.layers for tensor in layer.fetched]
        flop = sum(2 * module.top_k * tensor.row_bytes // tensor.dtype.itemsize for module, tensor in tensors)
        rate = copy_rate(self.engine, self.refilled[0], self.build.config.timeout_s)
        first = tensors[0][1]
        return estimate(self.refilled, flop, tokens, rate, product_rate(first.dtype, first.parameter.device))

    @property
    def bytes_per_forward(self) -> int:
        """Bytes that a forward pulls from peers."""
        return sum(program.pulled_bytes for program in self.refilled)

    @property
    def experts_held(self) -> int:
        """Experts of one layer resident on this rank (the most of any layer)."""
        return max(len(layer.build.placement.shares[self.build.rank]) for layer in self.layers)

    @property
    def slab_bytes(self) -> int:
        """Bytes of all slabs of this rank."""
        return sum(layer.slab.nbytes for layer in self.layers)

    def snapshot(self) -> dict[str, Any]:
        """The counters, with what was read of the checkpoint and what small tensors cost."""
        return {
            **self.counters.snapshot().to_dict(),
            **({} if self.hits is None else {"hits": self.hits.summary()}),
            "replicated_bytes": self.replicated_bytes,
            "bytes_per_forward": self.bytes_per_forward,
            "read_expert_bytes": READ.expert_bytes,
            "read_other_bytes": READ.other_bytes,
            "read_largest": READ.largest,
        }

    def describe(self, place: str) -> str:
        """One line at start; `place`: where this worker runs."""
        experts = max(layer.build.placement.num_experts for layer in self.layers)
        slots = sum(slot.nbytes for slot in self.slots)
        return (
            f"{self.experts_held} of {experts} experts in {len(self.layers)} MoE layers "
            f"({self.slab_bytes / 1e6:.1f} MB), worker in {place}, view {self.view}, "
            f"{len(self.slots)} slots ({slots / 1e6:.1f} MB), a forward pulls {self.bytes_per_forward / 1e6:.1f} MB"
        )

    def close(self) -> None:
        """Wait for copies in flight, then let go of peers and slabs; idempotent. Peers' mappings outlive ours.

        Raises DwdpTimeout where a copy does not end; its memory then stays mapped.
        """
        if self.prefetcher is not None:
            self.prefetcher.close(_CLOSE_TIMEOUT_S)
            # Before anything is let go: memory is not freed under a copy, for which CUDA would wait without a limit.
            self.engine.close(_CLOSE_TIMEOUT_S)
        self._closing.close()
