"""One side of travel.py: a GPU's layers, the other side's, and what both ask of each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ci.bench.travel_layers import Shape
    from vllm_dwdp.kernels.tiles import KernelName

#: That a layer can be asked to have, and those that it has unless told.
TOKENS = (1, 2, 4, 8, 32, 64)
USUAL = (1, 8, 32, 64)


class Rank:
    """One side."""

    def __init__(self, rank: int, shape: Shape, layers: int, limit_us: float, kernels: dict[int, KernelName]) -> None:
        """kernels: for local layers of so many tokens, instead of the one of the tile table."""
        import torch

        from vllm_dwdp.kernels.bench.shapes import free_memory, layer_ops
        from vllm_dwdp.transport.cuda_copy import CopyOptions
        from vllm_dwdp.transport.cuda_cupy import CupyDevice
        from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport

        self.torch, self.rank, self.layers, self.limit_us = torch, rank, layers, limit_us
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.cuda = CupyDevice(rank)
        self.transport = CupyIpcTransport(self.cuda, CopyOptions())
        self.layer, self.model = shape, shape.model
        self.ops = layer_ops(self.model, self.device)
        self.slabs, self.beside = [], []
        for layer in range(layers):
            slab = self.transport.allocate_slab(shape.nbytes)
            self.beside.append(shape.fill(slab.tensor(), seed=layer))
            self.slabs.append(slab)
        free_memory(self.device)
        torch.cuda.synchronize()  # before the other side reads
        self.graphs: dict[Any, Any] = {}
        self.kernels = kernels

    def exported(self) -> list[Any]:
        """Handles of the slabs and of the memory that the other side writes, and the bells' file."""
        from vllm_dwdp.travel.exchange import Exchange, Places

        self.layout = self.layer.mail(max(TOKENS))
        places = Places(2, self.layout.mail_bytes, self.layout.rows_bytes)
        self.exchange = Exchange(self.transport, self.cuda, places)
        return [[self.transport.export_handle(slab) for slab in self.slabs], self.exchange.handles()]

    def join(self, slabs: list[Any], handles: dict[str, Any]) -> None:
        """Map the other side; capture what is launched for it; attend."""
        from vllm_dwdp.kernels.configs import layer_shape
        from vllm_dwdp.kernels.direct_tiles import direct_tiles_for
        from vllm_dwdp.kernels.requester import Requester
        from vllm_dwdp.kernels.served import Layers
        from vllm_dwdp.travel.attendant import Attendant

        torch, device, model = self.torch, self.device, self.model
        other = 1 - self.rank
        theirs = self.mapped = [self.transport.map_peer(handle) for handle in slabs]
        self.exchange.map({other: handles})
        self.local, self.direct = [], []
        owners, all_own = self.layer.owners(self.rank), [self.rank] * model.experts
        for own, far, beside in zip(self.slabs, theirs, self.beside, strict=True):
            where = [own.address, far.address] if self.rank == 0 else [far.address, own.address]
            self.local.append(self.layer.tables(where, all_own, beside, device))
            self.direct.append(self.layer.tables(where, owners, beside, device))
        self.shape = layer_shape(*self.local[0], model.top_k)
        self.tiles = {tokens: direct_tiles_for(self.shape, tokens, device, self.layer.block) for tokens in TOKENS}
        self.owners = torch.tensor(owners, dtype=torch.int32, device=device)
        exchange, places = self.exchange, self.exchange.places

        def at(address: int) -> Any:
            return torch.tensor([address, address], dtype=torch.int64, device=device)

        self.state = Requester.new_state(2, device)
        memory, outside = exchange.own.tensor(), exchange.memory(other).tensor()
        self.flags = memory[places.flags :][:8].view(torch.int32)
        limits = torch.full((len(TOKENS),), int(self.limit_us * 1000), dtype=torch.int64, device=device)
        self.requester = Requester(
            self.rank, 2, self.layout, TOKENS, self.state, self.flags,
            at(exchange.memory(other).address + places.mail(self.rank)), at(exchange.bell(other, self.rank)),
            at(exchange.own.address + places.rows(other)), limits,
        )  # fmt: skip
        served = Layers.of(self.direct)
        mail = memory[places.mail(other) :][: self.layout.mail_bytes]
        rows = outside[places.rows(self.rank) :][: self.layout.rows_bytes].view(self.layout.row_type)
        flag = outside[places.flags + 4 * self.rank :][:4].view(torch.int32)
        self.kept: list[Any] = [served, rows, flag]
        graphs = []
        for tokens in TOKENS:
            part = rows[: tokens * model.top_k * model.hidden].view(-1, model.hidden)

            def serve(tokens: int = tokens, part: Any = part) -> None:
                served.serve(mail, self.layout, tokens, part, flag, self.ops, self.tiles[tokens])

            graphs.append(self.captured_raw(serve))
        from vllm_dwdp.kernels.travel import answer_kernel

        graphs.append(self.captured_raw(lambda: answer_kernel[(1,)](mail[:64].view(torch.int32), flag)))
        torch.cuda.synchronize()
        self.attendant = Attendant(exchange.bells(), {other: graphs}, {other: self.cuda.make_stream()})
        self.attendant.start(lambda: torch.cuda.set_device(device))

    def captured_raw(self, call: Callable[[], None]) -> int:
        """Warmed up, captured and instantiated: a CUgraphExec."""
        from cupy.cuda import runtime

        torch = self.torch
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            call()
        self.kept.append(graph)
        return int(runtime.graphInstantiate(graph.raw_cuda_graph()))

    def call(self, way: str, tokens: int) -> Callable[[], Any]:
        """All layers as one CUDA graph."""
        from vllm_dwdp.kernels.bench.timing import captured
        from vllm_dwdp.kernels.configs import tiles_for
        from vllm_dwdp.kernels.split_moe import Workspace, split_experts

        if (way, tokens) in self.graphs:
            return self.graphs[way, tokens]
        torch = self.torch
        torch.manual_seed(tokens + 1000 * self.rank)
        batches = [
            (torch.randn(tokens, self.model.hidden, device=self.device, dtype=self.layer.dtype),
             torch.rand(tokens, self.model.top_k, device=self.device),
             torch.rand(tokens, self.model.experts, device=self.device).topk(self.model.top_k)[1].to(torch.int32))
            for _ in range(self.layers)
        ]  # fmt: skip
        like, routes = batches[0][0], tokens * self.model.top_k
        width, tables = self.ops.width(self.local[0][0].rows), self.local[0]
        room = Workspace.allocate(2 * routes, width, *tables, like)
        out = torch.empty(self.layers, tokens, self.model.hidden, device=self.device, dtype=self.layer.dtype)

        # Sent as they are: an echo is timed without the work of either side.
        sent = [self.ops.quantize(hidden, None) for hidden, _, _ in batches] if way == "echo" else []

        def forward() -> None:
            for layer, (hidden, weights, ids) in enumerate(batches):
                if way == "travel":
                    given, scale = self.ops.quantize(hidden, None)
                    self.requester.experts(
                        given, self.direct[layer], weights, ids, layer=layer, owners=self.owners, ops=self.ops,
                        tiles=self.tiles[tokens], workspace=room, out=out[layer], a1_scale=scale,
                    )  # fmt: skip
                elif way == "echo":
                    own, late = ids.new_empty(1, self.model.top_k), ids.new_empty(1, self.model.top_k)
                    given, scale = sent[layer]
                    self.requester.ask(given, weights, ids, own, self.owners, layer, 1, len(TOKENS), scale)
                    self.requester.wait(ids, late, self.owners, 0)
                else:
                    tabled = self.direct[layer] if way == "direct" else self.local[layer]
                    tiles = self.tiles.get(tokens) if way == "direct" else None
                    tiles = tiles or tiles_for(self.shape, tokens, self.device, self.layer.block)
                    tiles = replace(tiles, kernel=self.kernels.get(tokens, tiles.kernel))
                    split_experts(
                        hidden, *tabled, weights, ids, ops=self.ops, tiles=tiles, workspace=room, out=out[layer]
                    )

        call = captured([forward], self.device)[0]
        self.kept += [batches, sent, room, out]
        self.graphs[way, tokens] = call
        self.graphs["out", way, tokens] = out
        return call

    def load(self, way: str, tokens: int, seconds: float) -> dict[str, float]:
        """That again and again; microseconds a layer, and how many requests were late."""
        torch = self.torch
        call = self.call(way, tokens)
        self.state[0, :] = 0  # asked from the second layer on
        self.state[3, :] = 0
        self.state[4, :] = 4
        self.state[7, 0] = 1
        call()
        torch.cuda.synchronize()
        before = self.state.clone()
        took, begun = [], time.perf_counter()
        while time.perf_counter() - begun < seconds:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            call()
            last.record()
            last.synchronize()
            took.append(first.elapsed_time(last) * 1000 / self.layers)
        asked, late = (int(self.state[row].sum() - before[row].sum()) for row in (5, 6))
        return {"us": statistics.median(took), "worst_us": max(took), "runs": len(took), "asked": asked, "late": late}

    def same(self, tokens: int) -> bool:
        """Whether travel gives what direct reads give."""
        found = []
        for way in ("direct", "travel"):
            call = self.call(way, tokens)
            call()
            call()
            self.torch.cuda.synchronize()
            found.append(self.graphs["out", way, tokens].clone())
        return bool(self.torch.equal(*found))
