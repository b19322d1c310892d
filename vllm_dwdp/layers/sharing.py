"""The experts of one rank's model, shared with its group: slabs, peers, views, ring and counters in one object."""

from __future__ import annotations

import contextlib
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.coverage import check_slots
from vllm_dwdp.layers.first_use import seal, unused
from vllm_dwdp.layers.hits import HitCounts
from vllm_dwdp.layers.kept import check_kernels
from vllm_dwdp.layers.largest import share_largest
from vllm_dwdp.layers.map_peers import map_peers
from vllm_dwdp.layers.rates import copy_rate, product_rate
from vllm_dwdp.layers.read_stats import READ
from vllm_dwdp.layers.slabs import move_to_slabs, replicate_small, tensors_of
from vllm_dwdp.layers.transports import make_transport, page_of_group
from vllm_dwdp.layers.views import BOTH_WAYS, VIEWS, choose_view, composite, contiguous, inplace
from vllm_dwdp.layers.views.direct import DirectGate, ForwardCounts, layer_costs, measured_tokens, memory_rate
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.prefetch.trace import TracedPrefetcher, TraceEvent
from vllm_dwdp.transport.base import Program, Slot
from vllm_dwdp.transport.shm import ShmTransport
from vllm_dwdp.transport.vmm import VmmTransport

if TYPE_CHECKING:
    from vllm_dwdp.group.launch import DwdpLaunch
    from vllm_dwdp.group.rendezvous import Rendezvous
    from vllm_dwdp.layers.travel import Travel

_CLOSE_TIMEOUT_S = 5.0


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
        tensors = tensors_of(build)
        self.view = choose_view(build, tensors, lambda: page_of_group(build, rendezvous, group))
        self.transport = make_transport(build, launch.cores, self.view)
        self.slots: list[Slot] = []
        self.trace: list[TraceEvent] = []
        self.prefetcher: Prefetcher | None = None
        self.refilled: list[Program] = []
        self.direct_tokens: int | None = 0
        self.travel: Travel | None = None
        self._captured = 0
        self._closing = contextlib.ExitStack()
        self._closing.callback(self.transport.close)
        try:
            paged = composite.lay_out(tensors, self._vmm.page) if self.view == "composite" else None
            self.layers = move_to_slabs(build, self.transport, tensors, paged)
            map_peers(self.layers, build, self.transport, rendezvous, group)
            share_largest(build, rendezvous, group)
            self.replicated_bytes = sum(replicate_small(layer, build.rank) for layer in self.layers)
            self.counters = CounterPage.create(rendezvous.rank, peers=sum(rank != rendezvous.rank for rank in group))
            self._closing.callback(self.counters.close)
            if self.view == "inplace":
                self._attach_pages()
            else:
                self._bind_ring()
                if self.view in BOTH_WAYS:
                    # The least of the group, so that its ranks behave alike; who is dead says nothing.
                    said = rendezvous.gather("direct_tokens", self._most_direct(launch), group)
                    self.direct_tokens = min(tokens for tokens in said if tokens is not None)
                self._attach_ring()
                if most := self._most_travelling():
                    self._set_out(most, rendezvous, group)
            span = self.travel.span if self.travel else (1, 0)
            self.forwards = ForwardCounts(self.counters, self.layers, build.rank, self.direct_tokens, span)
            device = self.layers[0].fetched[0].parameter.device
            self.hits = HitCounts(build.layers, build.rank, device) if build.config.hits else None
            self.counters.describe(self.view, self.experts_held, self.slab_bytes, sum(s.nbytes for s in self.slots))
            rendezvous.put("counters", self.counters.handle().to_dict())
            # In-place ranges open the owners' files once more: no owner may leave before all are mapped.
            rendezvous.gather("mapped", True, group)
        except BaseException:
            with contextlib.suppress(DwdpError):  # what failed is the one to tell
                self.close()
            raise

    def _attach_pages(self) -> None:
        assert isinstance(self.transport, ShmTransport)
        self.direct_tokens = None
        gate = inplace.InplaceGate(self.counters)
        for i, layer in enumerate(self.layers):
            inplace.attach(layer, self.build.rank, self.transport)
            # The range has mappings of its own.
            for peer in layer.peers.values():
                self.transport.unmap_peer(peer)
            layer.build.module.dwdp_attach(gate, i)

    def _bind_ring(self) -> None:
        """The slots, the copy engine and the copies of every layer; nothing waits for them yet."""
        config, rank = self.build.config, self.build.rank
        self.ring = ring = Ring(len(self.layers), config.num_slots)
        view = VIEWS[self.view]
        nbytes = view.slot_bytes(self.layers, rank)
        if self.build.expects_pages:
            check_slots(self.build, ring.used_slots * nbytes)
        if self.view == "composite":
            self.replicated_bytes += composite.fill(self.layers, rank)
            self.slots = [composite.allocate_slot(self.layers, rank, self._vmm) for _ in range(ring.used_slots)]
            attach: Any = partial(composite.attach, transport=self._vmm)
        else:
            self.slots = [self.transport.allocate_slot(nbytes) for _ in range(ring.used_slots)]
            attach = view.attach
        self.engine = engine = self.transport.copy_engine()
        slice_bytes = config.resolve_slice_bytes(self.build.platform)
        self.programs = [
            attach(layer, rank, self.slots[ring.slot_of(i)], engine, slice_bytes) for i, layer in enumerate(self.layers)
        ]

    def _most_direct(self, launch: DwdpLaunch) -> int:
        """As the user says, or as this rank measures; more where the user named larger sizes of CUDA graphs."""
        given = self.build.config.direct_tokens
        if given == 0 or self.transport.name == "cuda_pinned":
            return 0
        self._captured = launch.captured_tokens
        if given == "auto":
            given = measured_tokens(self.layers, self.build.rank, self.link_rate, self.memory_rate, self.product_rate)
            if self.build.config.decode != "direct":
                from vllm_dwdp.layers.travel import why_not

                given = max(given, 0 if why_not(self.build, self.layers) else self.build.config.travel_tokens)
        return max(int(given), self._captured)

    def _most_travelling(self) -> int:
        """The most tokens of a forward whose tokens travel; 0 where none do.

        Raises DwdpError where they should and cannot.
        """
        decode = self.build.config.decode
        why = "experts are not read directly" if not self.direct_tokens else None
        if why is None and decode != "direct":
            from vllm_dwdp.layers.travel import why_not

            why = why_not(self.build, self.layers)
        if decode == "travel" and why is not None:
            raise DwdpError(f'dwdp.decode is "travel", but {why}: leave it out, or write "direct"')
        if decode == "direct" or why is not None:
            return 0
        return min(self.build.config.travel_tokens, self.direct_tokens or 0)

    def _set_out(self, most: int, rendezvous: Rendezvous, group: list[int]) -> None:
        from vllm_dwdp.layers.travel import Travel

        layer = self.layers[0]
        costs = layer_costs(layer, self.build.rank, self.link_rate, self.memory_rate, self.product_rate)
        self.travel = Travel(self.build, self.layers, self.transport, rendezvous, group, costs, most, self.counters)

    def _attach_ring(self) -> None:
        config, ring, programs = self.build.config, self.ring, self.programs
        make = partial(TracedPrefetcher, trace=self.trace) if config.trace else Prefetcher
        self.prefetcher = make(ring, self.engine, programs, self.counters, config.timeout_s)
        # A layer with a slot of its own is pulled once and stays.
        self.refilled = [program for i, program in enumerate(programs) if ring.next_layer(i) is not None]
        for i, layer in enumerate(self.layers):
            module, most = layer.build.module, self.direct_tokens
            gate = DirectGate(self.prefetcher, module, most) if most else contiguous.RingGate(self.prefetcher)
            module.dwdp_attach(gate, i)
        if self.view != "split" and not self.build.platform.on_cpu:
            check_kernels(self.layers, self.view)

    @property
    def _vmm(self) -> VmmTransport:
        """The transport of a view that is made of pages."""
        assert isinstance(self.transport, VmmTransport)
        return self.transport

    @cached_property
    def link_rate(self) -> float:
        """Bytes/s of copies, mostly from peers; fills slots, so not to be asked after the first forward."""
        return copy_rate(self.engine, self.programs[0], self.build.config.timeout_s)

    @cached_property
    def memory_rate(self) -> float:
        """Bytes/s that kernels of this rank read and write."""
        if self.build.platform.on_cpu:
            # A copy reads and writes, and one thread copies: taken for half of what memory gives.
            return 4 * self.link_rate
        return memory_rate(self.layers[0].fetched[0].parameter.device)

    @cached_property
    def product_rate(self) -> float:
        """FLOP/s of matrix products of this rank."""
        fetched = self.layers[0].fetched[0]
        return product_rate(fetched.dtype, fetched.parameter.device)

    def warmed_up(self, rendezvous: Rendezvous, group: list[int]) -> None:
        """No graph is captured here any more: once that is so everywhere, tokens may travel."""
        if self.travel is not None:
            rendezvous.gather("warmed_up", True, group)
            self.travel.enable()

    def start(self) -> None:
        """Begin to prefetch; the model may run."""
        if self.prefetcher is not None:
            self.prefetcher.start()

    def count(self, tokens: int) -> None:
        """A forward of `tokens` tokens begins."""
        self.forwards.add(tokens)
        if self.travel is not None:
            self.travel.counts.count()

    def unused(self) -> list[str]:
        """Names of the layers that were never acquired."""
        return [layer.build.name for layer in unused(self.layers)]

    def seal_unused(self) -> None:
        """To be called after vLLM's warm-up: see first_use.py."""
        if self.view != "inplace":
            seal(unused(self.layers), self.build.platform.on_cpu)

    @property
    def copies_s(self) -> float:
        """Seconds of the copies of a forward that pulls, of which the merge copy is one. Asked as `link_rate`."""
        return sum(program.pulled_bytes + program.merged_bytes for program in self.refilled) / self.link_rate

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
        if self.travel is not None:
            self.travel.counts.publish(now=True)
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
        slots = sum(slot.nbytes for slot in self.slots) / 1e6
        held, kept = self.slab_bytes / 1e6, self.replicated_bytes / 1e6
        return (
            f"{self.experts_held} of {experts} experts in {len(self.layers)} MoE layers ({held:.1f} MB, and {kept:.1f} MB "
            f"replicated), worker in {place}, view {self.view}, {len(self.slots)} slots ({slots:.1f} MB), a forward pulls "
            f"{self.bytes_per_forward / 1e6:.1f} MB{self._describe_direct()}"
        )

    def _describe_direct(self) -> str:
        if not self.direct_tokens:
            return "" if self.direct_tokens is None or self.build.platform.on_cpu else ", without CUDA graphs"
        told = self.build.config.direct_tokens
        how = "as measured" if told == "auto" else "as told"
        if self.travel is not None and self.direct_tokens == self.build.config.travel_tokens != told:
            how = "as travel_tokens asks"
        if self.direct_tokens == self._captured and told != self.direct_tokens:
            how = "as the sizes of CUDA graphs ask"
        said = f", one of at most {self.direct_tokens} tokens ({how}) reads missing experts where they are"
        if self.travel is None:
            return said
        return f"{said}, or has their owners compute, {self.travel.told}"

    def close(self) -> None:
        """Wait for copies in flight, then let go of peers and slabs; idempotent. Peers' mappings outlive ours.

        Raises DwdpTimeout where a copy does not end; its memory then stays mapped.
        """
        if self.travel is not None:
            self.travel.close(_CLOSE_TIMEOUT_S)
        if self.prefetcher is not None:
            self.prefetcher.close(_CLOSE_TIMEOUT_S)
        if hasattr(self, "engine"):
            # Before anything is let go: memory is not freed under a copy, for which CUDA would wait without a limit.
            self.engine.close(_CLOSE_TIMEOUT_S)
        self._closing.close()
