"""What the transport vmm alone can do, for gpu_ipc.py: pieces of several allocations, a peer's too, in one range of
addresses; their bytes, the time to map them, and the rate of torch's own products on them."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final

from ci.bench.rates import LIMIT_S, MIB, Row, timed
from ci.checks.gpu_ranks import make_transport
from vllm_dwdp.transport.base import Copy
from vllm_dwdp.transport.cuda_copy import CopyOptions
from vllm_dwdp.transport.cuda_device import CudaDevice
from vllm_dwdp.transport.vmm import Part, VmmTransport
from vllm_dwdp.transport.vmm_memory import VmmMemory, VmmPeerSlab

if TYPE_CHECKING:
    import torch

PIECE: Final = 64 * MIB
MANY: Final = 200
#: Of contiguous memory's rate, on a range composed of own pieces.
LEAST_RATIO: Final = 0.95
TURNS: Final = 21

#: Seconds of a product of so many tokens with the weights in a tensor.
Product = Callable[["torch.Tensor", int], float]


def mark(memory: VmmMemory, first: int) -> None:
    """Fill piece i with first + i."""
    seen, at = memory.tensor(), 0
    for number, piece in enumerate(memory.pieces):
        seen[at : at + piece.nbytes] = first + number
        at += piece.nbytes


def compose_rows(device: CudaDevice, transport: VmmTransport, peer: VmmPeerSlab, product: Product) -> list[Row]:
    """peer: two equal pieces, marked from 1."""
    size = peer.pieces[0].nbytes
    own, slot = transport.allocate_pieces([size, size]), transport.allocate_slot_pieces([size, size])
    mark(own, 101)
    mark(slot, 111)
    rows = []
    for name, parts, marks in (
        ("own first", [Part(own, 1), Part(peer, 1), Part(slot, 0), Part(peer, 0)], [102, 2, 111, 1]),
        ("a peer's first", [Part(peer, 1), Part(own, 0), Part(peer, 0), Part(slot, 1)], [2, 101, 1, 112]),
    ):
        begin = time.perf_counter()
        composed = transport.compose(parts)
        rows.append(Row("compose", f"{name}: time to compose", (time.perf_counter() - begin) * 1e3, "ms"))
        wrong = wrong_bytes(composed.tensor(), size, marks)
        rows.append(Row("compose", f"{name}: wrong bytes", wrong, "bytes", wrong == 0))
        target = transport.allocate_slot(len(parts) * size)
        engine = transport.copy_engine()
        # Over the borders of all pieces.
        copy = Copy(target.address + size // 2, composed.address + size // 2, (len(parts) - 1) * size)
        engine.finish(engine.submit(engine.bind([copy])), LIMIT_S)
        middle = slice(size // 2, size // 2 + copy.nbytes)
        differ = int((target.tensor()[middle] != composed.tensor()[middle]).sum())
        rows.append(Row("compose", f"{name}: wrong bytes, one copy over the borders", differ, "bytes", differ == 0))
        engine.close(LIMIT_S)
        target.close()
        composed.close()
    whole = transport.allocate_slab(2 * size)
    ranges = {"own": transport.compose([Part(own, 0), Part(slot, 0)])}
    ranges["half a peer's"] = transport.compose([Part(own, 1), Part(peer, 0)])
    for tokens in (16, 4096):
        least = product(whole.tensor(), tokens)
        for name, made in ranges.items():
            ratio = least / product(made.tensor(), tokens)
            ok = ratio >= LEAST_RATIO if name == "own" else None
            rows.append(Row("compose", f"{name}: rate of a product, {tokens} tokens", ratio, "", ok, "of contiguous"))
    return rows


def wrong_bytes(seen: "torch.Tensor", size: int, marks: Sequence[int]) -> int:
    return sum(int((seen[i * size : (i + 1) * size] != value).sum()) for i, value in enumerate(marks))


def torch_product(device: CudaDevice) -> Product:
    """The median of some products, on the compute stream."""
    import torch

    def seconds(weights: "torch.Tensor", tokens: int) -> float:
        matrix = weights.view(torch.bfloat16).view(-1, 4096)
        left = torch.zeros(tokens, 4096, dtype=torch.bfloat16, device="cuda")
        out = left @ matrix.T
        stream = device.compute_stream()
        return statistics.median(timed(device, stream, lambda: torch.mm(left, matrix.T, out=out)) for _ in range(TURNS))

    return seconds


def own_pieces(pipe: Connection) -> None:
    """In a process of its own, on the second device where there are two: two large pieces, and many small ones; it ends when
    its pipe is closed."""
    import torch

    made = make_transport("vmm", 1, 2, CopyOptions())
    assert isinstance(made, VmmTransport)
    slabs = [made.allocate_pieces([PIECE] * 2), made.allocate_pieces([made.page] * MANY)]
    for slab in slabs:
        mark(slab, 1)
    torch.cuda.synchronize()
    pipe.send([made.export_handle(slab) for slab in slabs])
    try:
        pipe.recv()
    except EOFError:
        made.close()


def compose_part() -> list[Row]:
    """With an owner in another process."""
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    owner = spawn.Process(target=own_pieces, args=(theirs,))
    owner.start()
    theirs.close()
    try:
        transport = make_transport("vmm", 0, 2, CopyOptions())
        assert isinstance(transport, VmmTransport)
        large, many = pipe.recv()
        rows = []
        for name, handle in (("2 pieces", large), (f"{MANY} pieces", many)):
            begin = time.perf_counter()
            mapped = transport.map_peer(handle)
            rows.append(Row("compose", f"{name}: time to map", (time.perf_counter() - begin) * 1e3, "ms"))
            wrong = wrong_bytes(mapped.tensor(), mapped.pieces[0].nbytes, range(1, 1 + len(mapped.pieces)))
            rows.append(Row("compose", f"{name}: wrong bytes", wrong, "bytes", wrong == 0))
            if handle is large:
                peer = mapped
        read_only = transport.peers_read_only
        rows.append(
            Row("compose", "peers' memory is mapped read-only", float(bool(read_only)), "", None, str(read_only))
        )
        rows += compose_rows(transport.device, transport, peer, torch_product(transport.device))
        transport.close()
        return rows
    finally:
        pipe.close()
        owner.join(30)
        if owner.is_alive():
            owner.kill()
