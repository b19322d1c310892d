"""Tokens that travel: forwards of few tokens have the owners of missing experts compute them (GPUs, split view).

What every rank sets up once, when its tables are there: a mailbox for every other rank, a CUDA graph for each of them and
each size of batch, and the thread that launches those. What a forward does stands in kernels/travel.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from vllm_dwdp.direct import LayerCosts
from vllm_dwdp.errors import DwdpError, DwdpTimeout
from vllm_dwdp.kernels.compile_ahead import compile_ahead
from vllm_dwdp.kernels.mail import MailLayout
from vllm_dwdp.kernels.requester import Journey, Requester
from vllm_dwdp.kernels.served import Layers
from vllm_dwdp.kernels.travel import ENABLED
from vllm_dwdp.layers.travel_counts import TravelCounts
from vllm_dwdp.predict.travel import TravelLayer, first_to_travel
from vllm_dwdp.transport.cuda_peers import CudaTransport
from vllm_dwdp.travel.attendant import Attendant
from vllm_dwdp.travel.exchange import Exchange, Places

if TYPE_CHECKING:
    from vllm_dwdp.group.rendezvous import Rendezvous
    from vllm_dwdp.layers.build import ModelBuild
    from vllm_dwdp.layers.slabs import LayerSlab
    from vllm_dwdp.prefetch.counters import CounterPage
    from vllm_dwdp.transport.base import Transport

#: Seconds for what a start that failed has launched to end.
_FAILED_S: Final = 5.0
#: Nanoseconds that a request may take beside what reading the experts directly would.
_BESIDE_NS: Final = 100_000


def sizes(most: int) -> tuple[int, ...]:
    """Of the batches that owners compute: powers of two, and `most`."""
    return tuple(sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most}))


def why_not(build: ModelBuild, layers: Sequence[LayerSlab]) -> str | None:
    """None where tokens can travel; else why they cannot."""
    config = build.config
    if any(layer.build.module.dwdp_tables is None for layer in layers):
        return "the view is not split, whose tables owners compute with"
    if config.group is not None:
        return "a rank that is a server of its own may die, and would not answer"
    if config.ranks_per_device > 1:
        return f"{config.ranks_per_device} ranks share a GPU, which would serve them in turns"
    if config.transport == "cuda_pinned":
        return 'transport "cuda_pinned" reaches no GPU of a peer'
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed, which vLLM asks for"
    kinds = set()
    for layer in layers:
        module: Any = layer.build.module
        tables = module.dwdp_tables.direct
        if (scales := tables[0].scales) is not None and scales.kind != "block":
            return f"weights are FP8 with scales per {scales.kind}"
        if scales is not None and module.moe_config.in_dtype != torch.bfloat16:
            return f"weights are FP8 in a model of {module.moe_config.in_dtype}"
        beside = [table.scales.values for table in tables if table.scales is not None]
        beside += [table.bias for table in tables if table.bias is not None]
        if not all(map(_is_copied_whole, beside)):
            return "scales or biases do not lie side by side in memory"
        if module.apply_router_weight_on_input:
            return "router weights are multiplied onto the layers' inputs"
        # One graph computes for all layers.
        computed = module.activation, module.quant_method.moe_kernel.fused_experts.activation_config
        shapes = ((table.num_experts, table.rows, table.cols, table.dtype, table.bias is None) for table in tables)
        kinds.add((module.top_k, *computed, *shapes))
    return None if len(kinds) == 1 else f"there are {len(kinds)} kinds of MoE layers"


def _is_copied_whole(tensor: torch.Tensor) -> bool:
    """Whether its elements, in words of four bytes, are all that there is from its address on."""
    dense = tensor.stride() == torch.empty_like(tensor, device="meta").stride()
    return dense and tensor.numel() * tensor.element_size() % 4 == 0


class Travel:
    """Set up once by every rank of a group, at the same time; then `enable`d, once no rank captures any more.

    Raises:
        DwdpError: memory is short. DwdpTimeout, PeerLost: a peer did not come, or failed.
    """

    def __init__(
        self,
        build: ModelBuild,
        layers: Sequence[LayerSlab],
        transport: Transport,
        rendezvous: Rendezvous,
        group: list[int],
        costs: LayerCosts,
        most: int,
        counters: CounterPage,
    ) -> None:
        assert isinstance(transport, CudaTransport)
        self._device, self._rank, self._ranks = transport.device, build.rank, len(group)
        self._streams: dict[int, int] = {}
        self._graphs: list[int] = []
        self._kept: list[Any] = []
        self.attendant: Attendant | None = None
        first: Any = layers[0].build.module
        self._kernel = first.quant_method.moe_kernel.fused_experts
        self._activation = first.activation
        self._kernel.direct = True
        w13, w2 = self._kernel.tables
        self.buckets = sizes(most)
        groups = -(-w13.cols // self._kernel.block_shape[1]) if self._kernel.quant_kind == "block" else 0
        row_type = torch.bfloat16 if groups else w13.dtype
        self._layout = MailLayout(most, first.top_k, w2.rows, groups, w13.dtype, row_type)
        places = Places(self._ranks, self._layout.mail_bytes, self._layout.rows_bytes)
        self.exchange = Exchange(transport, self._device, places)
        try:
            given = rendezvous.gather("travel", self.exchange.handles(), group)
            self.exchange.map({rank: handles for rank, handles in enumerate(given) if rank != self._rank})
            self._requester = self._make_requester(costs)
            self._first = self._least(build, costs, w13.dtype, rendezvous, group)
            self._attach(layers)
            self.attendant = self._make_attendant(layers)
            self.counts = TravelCounts(self.state, self.attendant, counters)
            for layer in layers:
                kernel = layer.build.module.quant_method.moe_kernel.fused_experts
                kernel.gives_way = lambda: self.counts.asked_lately
            self.attendant.start(partial(torch.cuda.set_device, self._device.index))
        except BaseException:
            # What failed is the one to tell, not what cannot be tidied up after it.
            with contextlib.suppress(DwdpError):
                self.close(_FAILED_S)
            raise

    def _least(
        self, build: ModelBuild, costs: LayerCosts, dtype: torch.dtype, rendezvous: Rendezvous, group: list[int]
    ) -> int:
        """Tokens of a forward from which on owners are asked: the least of the group, so that its ranks behave alike."""
        mine = 1
        if build.config.decode == "auto":
            mine = first_to_travel(
                TravelLayer(costs, self._ranks, self._layout.hidden, dtype.itemsize), self.buckets[-1]
            )
        return min(rendezvous.gather("least_travelling", mine, group))

    def _make_requester(self, costs: LayerCosts) -> Requester:
        exchange, places = self.exchange, self.exchange.places
        device = torch.device("cuda", self._device.index)

        def table(addresses: list[int]) -> torch.Tensor:
            return torch.tensor(addresses, dtype=torch.int64, device=device)

        others = [rank != self._rank for rank in range(self._ranks)]
        mails = [exchange.memory(rank).address + places.mail(self._rank) for rank in range(self._ranks)]
        bells = [exchange.bell(rank, self._rank) if other else 0 for rank, other in enumerate(others)]
        rows = [exchange.own.address + places.rows(rank) for rank in range(self._ranks)]
        flags = exchange.own.tensor()[places.flags :][: 4 * self._ranks].view(torch.int32)
        limits = [int(costs.direct_s(tokens) * 1e9) + _BESIDE_NS for tokens in self.buckets]
        self.state = Requester.new_state(self._ranks, device)
        return Requester(
            self._rank, self._ranks, self._layout, self.buckets, self.state, flags, table(mails), table(bells), table(rows),
            table(limits),
        )  # fmt: skip

    def _attach(self, layers: Sequence[LayerSlab]) -> None:
        """Have the layers' direct forwards ask; compile what they, and their peers' requests, launch."""
        owners: dict[tuple[int, ...], torch.Tensor] = {}
        for number, layer in enumerate(layers):
            who = tuple(layer.build.placement.owners[self._rank])
            if who not in owners:
                owners[who] = torch.tensor(who, dtype=torch.int32, device=self.state.device)
            layer.build.module.dwdp_travel(Journey(self._requester, number, owners[who], self._first))
        compile_ahead(partial(self._kernel.compile, tokens, self._layout.top_k) for tokens in self.buckets)

    def _make_attendant(self, layers: Sequence[LayerSlab]) -> Attendant:
        exchange, places, layout = self.exchange, self.exchange.places, self._layout
        own = exchange.own.tensor()
        tables = []
        for layer in layers:
            kernel = layer.build.module.quant_method.moe_kernel.fused_experts
            kernel.direct = True
            tables.append(kernel.tables)
        graphs: dict[int, list[int]] = {}
        for rank, peer in exchange.peers.items():
            theirs = peer.tensor()
            served = Layers.of(tables)
            mail = own[places.mail(rank) :][: layout.mail_bytes]
            rows = layout.part(
                theirs[places.rows(self._rank) :], 0, layout.row_type, layout.room * layout.top_k, layout.hidden
            )
            flag = layout.part(theirs[places.flags + 4 * self._rank :], 0, torch.int32, 1)
            pool = torch.cuda.graph_pool_handle()
            self._kept += [served, mail, rows, flag]
            graphs[rank] = [
                self._captured(partial(self._serve, served, mail, rows, flag, tokens), pool) for tokens in self.buckets
            ]
            self._streams[rank] = self._device.make_stream()
        return Attendant(exchange.bells(), graphs, self._streams)

    def _serve(self, served: Layers, mail: torch.Tensor, rows: torch.Tensor, flag: torch.Tensor, tokens: int) -> None:
        layout, kernel = self._layout, self._kernel
        part = rows[: tokens * layout.top_k]
        served.serve(mail, layout, tokens, part, flag, kernel.ops(self._activation), kernel.tiles(tokens, layout.top_k))

    def _captured(self, call: Any, pool: Any) -> int:
        """Run once, then captured: a graph that can be launched. Mailboxes are all zero yet: expert 0 of the first layer."""
        call()
        torch.cuda.synchronize()
        graph, stream = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        self._kept.append(graph)
        self._graphs.append(self._device.instantiate(graph.raw_cuda_graph(), stream.cuda_stream))
        return self._graphs[-1]

    @property
    def span(self) -> tuple[int, int]:
        """The least and the most tokens of a forward whose tokens travel."""
        return self._first, self.buckets[-1]

    @property
    def told(self) -> str:
        """`span` in words."""
        return f"{f'from {self._first} ' * (self._first > 1)}up to {self.buckets[-1]} tokens"

    def enable(self) -> None:
        """From here on owners are asked."""
        self.state[ENABLED.value, 0] = 1

    def close(self, timeout_s: float) -> None:
        """Serve nobody any more, and let go of what the peers gave; idempotent.

        Raises DwdpTimeout, and can then be called again.
        """
        if self.attendant is not None:
            self.attendant.stop(timeout_s)
            self.attendant = None
        # This rank's own forwards write into what is let go of here, too.
        self._finish(self._device.compute_stream(), "the last forward", timeout_s)
        for rank, stream in list(self._streams.items()):
            self._finish(stream, f"an answer to rank {rank} of the group", timeout_s)
            self._device.destroy_stream(stream)
            del self._streams[rank]
        while self._graphs:
            self._device.destroy_graph(self._graphs.pop())
        # Tensors of peers' slabs, which would keep those mapped.
        self._kept.clear()
        self.exchange.close()

    def _finish(self, stream: int, what: str, timeout_s: float) -> None:
        """Peers' memory is not let go of under what is written to it."""
        event, deadline = self._device.make_event(timing=False), time.monotonic() + timeout_s
        try:
            self._device.record(event, stream)
            while not self._device.query(event):
                if time.monotonic() > deadline:
                    raise DwdpTimeout(f"{what} is not done after {timeout_s:.3g} s: look for a stalled device")
                time.sleep(100e-6)
        finally:
            self._device.destroy_event(event)
