"""`ExpertSharing` as on GPUs over the simulated device: small layers, two ranks as threads of which one runs at a time, and
copies of torch that end only when the device runs them."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.cuda_rank import LIMIT_S, process_id
from tests.unit.fake_cuda import FakeCuda, Machine
from tests.unit.gpu_layers import EXPERTS, LAYERS, SHAPES, Experts, weights
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.group.launch import DwdpLaunch
from vllm_dwdp.layers.build import BuildApart, LayerBuild, ModelBuild
from vllm_dwdp.layers.sharing import ExpertSharing
from vllm_dwdp.placement import place
from vllm_dwdp.platform import CUDA

#: Tokens of a forward that pulls, whatever the limit of direct reads that tests set.
MANY = 1000


def as_bytes(rows: torch.Tensor) -> bytes:
    """Its bytes, which compare ten times as fast as values in BF16."""
    return rows.view(torch.uint8).numpy().tobytes()


class LateCopies(TorchDispatchMode):
    """Tensor.copy_ as on a device: into device memory it is given to the compute stream, and not done when it returns;
    into host memory it is done, behind that stream's work."""

    def __init__(self, device: FakeCuda) -> None:
        super().__init__()
        self.device = device

    def _on_device(self, tensor: torch.Tensor) -> bool:
        at, blocks = tensor.data_ptr(), self.device.blocks.values()
        return self.device.vmm.covers(at, 1) or any(block.real <= at < block.real + block.nbytes for block in blocks)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default or args[0].dtype != args[1].dtype:
            return func(*args, **(kwargs or {}))
        target, source = args[0], args[1]
        if not self._on_device(target):
            torch.cuda.synchronize()
            return func(*args, **(kwargs or {}))
        assert target.is_contiguous() and source.is_contiguous()

        def move() -> None:
            ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)

        self.device.kernel([move])
        return target


class Meeting:
    """`Rendezvous` of threads; the others run only while one waits."""

    def __init__(self, num_ranks: int) -> None:
        self.turn = threading.Condition()
        self.num_ranks = num_ranks
        self.said: dict[str, dict[int, Any]] = defaultdict(dict)

    def of(self, rank: int) -> Any:
        """As `engine.rendezvous.Rendezvous` of a rank."""

        def put(name: str, value: Any) -> None:
            self.said[name][rank] = value

        def get(other: int, name: str) -> Any:
            self.turn.notify_all()
            if not self.turn.wait_for(lambda: other in self.said[name] or not self.num_ranks, LIMIT_S):
                raise TimeoutError(name)
            return self.said[name][other]

        def gather(name: str, value: Any, group: list[int]) -> list[Any]:
            put(name, value)
            return [get(other, name) for other in group]

        def offers(other: int, name: str, timeout_s: float) -> Iterator[Any]:
            yield get(other, name)

        return SimpleNamespace(rank=rank, timeout_s=LIMIT_S, put=put, get=get, offers=offers, gather=gather)


@dataclass
class GpuRank:
    """A rank after set-up."""

    device: FakeCuda
    modules: list[Experts]
    build: ModelBuild
    sharing: ExpertSharing = field(init=False)
    wrong: int = 0
    compared: int = 0
    compared_direct: int = 0

    def rows(self, layer: int, name: str, direct: bool) -> torch.Tensor:
        """[E, *row] as kernels see them now by the addresses of a table."""
        shape = SHAPES[name]
        tables = self.modules[layer].quant_method.moe_kernel.fused_experts.tables
        table = (tables.direct if direct else tables.pulled)[list(SHAPES).index(name)]
        nbytes = 2 * shape[0] * shape[1]
        raw = [ctypes.string_at(self.device.real(at, nbytes), nbytes) for at in table.addresses.tolist()]
        return torch.frombuffer(bytearray(b"".join(raw)), dtype=torch.bfloat16).view(EXPERTS, *shape)

    def compare(self, layer: int) -> None:
        """The expert compute of a layer: a kernel that compares every byte, in pieces. Which table it takes, or which
        tensors, is settled when it is launched, or captured."""
        module = self.modules[layer]
        given = {name: getattr(module, name).data for name in SHAPES}
        if module.dwdp_ranges is not None:
            direct = given["w13_weight"].data_ptr() == module.dwdp_ranges.tensors[0].direct.data_ptr()
        else:
            direct = module.quant_method.moe_kernel.fused_experts.direct

        def piece(name: str) -> Callable[[], None]:
            def run() -> None:
                by_table = module.dwdp_tables is not None and name != "w13_bias"
                seen = self.rows(layer, name, direct) if by_table else given[name]
                self.compared += 1
                self.compared_direct += direct
                self.wrong += as_bytes(seen) != as_bytes(weights(layer, name))

            return run

        self.device.kernel([piece(name) for name in SHAPES])

    def forward(self, tokens: int = MANY, order: Sequence[int] | None = None, aborted: bool = False) -> None:
        """A forward of `tokens` tokens: these layers (all, if not given), each behind its gate; `aborted` before the last
        release."""
        layers = range(LAYERS) if order is None else order
        for turn, number in enumerate(layers):
            module = self.modules[number]
            assert module.dwdp_gate is not None
            module.dwdp_gate.acquire(module.dwdp_layer, tokens)
            self.compare(number)
            if not (aborted and turn == len(layers) - 1):
                module.dwdp_gate.release(module.dwdp_layer, tokens)

    def capture(self, tokens: int, order: Sequence[int] | None = None) -> int:
        """The graph of a forward, as torch captures it; where the forward raises there is none."""
        self.device.begin_torch_capture()
        try:
            self.forward(tokens, order)
        except BaseException:
            self.device.destroy_graph(self.device.end_torch_capture())
            raise
        return self.device.end_torch_capture()


class Group(NamedTuple):
    """Ranks in order, and what they said."""

    machine: Machine
    meeting: Meeting
    ranks: list[GpuRank]


def end_process(device: FakeCuda) -> None:
    """SIGKILL of the process: its work is gone, and its memory is another's but for what others have mapped."""
    for stream in device.streams.values():
        stream.work.clear()
    for block in device.blocks.values():
        if not block.mapped:
            ctypes.memset(block.real, 0xEE, block.nbytes)


def share_on_gpus(
    monkeypatch: pytest.MonkeyPatch,
    view: str,
    num_ranks: int = 2,
    seed: int = 0,
    captured_tokens: int = 0,
    apart: Callable[[int], BuildApart | None] = lambda rank: None,
    group: Group | None = None,
    builds: Sequence[ModelBuild] = (),
    extras: int = 0,
    **settings: Any,
) -> tuple[Machine, list[GpuRank]]:
    """`ExpertSharing` of every rank, not started; raises what one of them raised.

    group: of an earlier call, for the ranks that are no longer in there. builds: loaded layers, instead of small ones.
    extras: how many ranks there are beyond those that the group needs.
    """
    group, here = group or Group(Machine(seed), Meeting(num_ranks), []), threading.local()
    machine, meeting, ranks = group

    def synchronize() -> None:
        while any(stream.work for stream in here.device.streams.values()):
            assert machine._step()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: here.device.index)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("vllm_dwdp.transport.cuda_cupy.CupyDevice", lambda index: here.device)
    monkeypatch.setattr("vllm_dwdp.transport.cuda_bindings.BindingsVmm", lambda index: here.device.vmm)
    monkeypatch.setattr("vllm_dwdp.transport.cuda_peers.this_process", lambda: process_id(here.device.number))
    # Nothing is computed here for others.
    config = DwdpConfig.parse({"weight_view": view, "decode": "direct", **settings})
    launch = DwdpLaunch(config, num_ranks, "/made/up", (), captured_tokens=captured_tokens)
    placement, failed = place(EXPERTS, num_ranks, config.experts_per_rank), []
    starting = range(len(ranks), num_ranks + extras)
    for build in builds:
        build.config = config
        ranks.append(GpuRank(machine.process(), [layer.module for layer in build.layers], build.open()))
    for rank in () if builds else starting:
        build = ModelBuild(config, rank % num_ranks, num_ranks, platform=CUDA, apart=apart(rank))
        build.layers = [LayerBuild(None, f"layer{i}", placement, False) for i in range(LAYERS)]
        modules = [Experts(i, build.built(layer)) for i, layer in enumerate(build.layers)]
        for layer, module in zip(build.layers, modules, strict=True):
            layer.module = module
        ranks.append(GpuRank(machine.process(), modules, build.open()))

    def set_up(rank: int) -> None:
        with ExitStack() as stack:
            stack.enter_context(meeting.turn)
            here.device = ranks[rank].device
            stack.enter_context(LateCopies(here.device))
            try:
                ranks[rank].sharing = ExpertSharing(ranks[rank].build, meeting.of(rank), launch)
            except BaseException as error:
                failed.append(error)
                meeting.num_ranks = 0  # nobody waits for it
                meeting.turn.notify_all()

    threads = [threading.Thread(target=set_up, args=(rank,)) for rank in starting]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    if failed:
        raise failed[0]
    return machine, ranks
