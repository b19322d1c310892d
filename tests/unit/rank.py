"""A whole rank in a process of its own, without vLLM: slabs, handles, mapping, plans, prefetching, comparing."""

import random
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.unit.helpers import LIMIT_S
from tests.unit.owner import receive
from vllm_dwdp.copy_plan import LayerLayout, Layout, TensorSpec, build_plan
from vllm_dwdp.placement import place
from vllm_dwdp.prefetch.counters import CounterPage
from vllm_dwdp.prefetch.prefetcher import Prefetcher, bind_plan
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.base import Memory
from vllm_dwdp.transport.shm import ShmTransport

TENSORS = (TensorSpec("w13", 3000), TensorSpec("w2", 1536), TensorSpec("scale", 12))


class Setting(NamedTuple):
    num_ranks: int
    num_experts: int
    num_layers: int
    num_slots: int
    forwards: int
    experts_per_rank: int | None = None
    slice_bytes: int = 4096


class Outcome(NamedTuple):
    wrong: int  # acquired layers with a wrong byte
    compared: int  # acquired layers
    on_demand_fetches: int
    pulled_bytes: int
    expected_pull_bytes: int  # per pull
    pulls: int


def expert(layer: int, tensor: int, index: int) -> NDArray[np.uint8]:
    """The weights everybody agrees on."""
    return np.random.default_rng((layer, tensor, index)).integers(0, 256, TENSORS[tensor].row_bytes, dtype=np.uint8)


def flat(memory: Memory) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = memory.tensor().numpy()
    return found


def fill(target: NDArray[np.uint8], layout: Layout, layer: int) -> None:
    for tensor, spec in enumerate(TENSORS):
        for index in layout.experts:
            target[layout.offset(spec.name, index) :][: spec.row_bytes] = expert(layer, tensor, index)


def run_rank(pipe: Connection, rank: int, setting: Setting) -> None:
    """Sends its handles per layer, takes everybody's, prefetches and compares, sends an Outcome, and ends on 'end'."""
    transport = ShmTransport(LIMIT_S)
    placement = place(setting.num_experts, setting.num_ranks, setting.experts_per_rank)
    layout = LayerLayout(placement, TENSORS)
    plan = build_plan(layout, rank, setting.slice_bytes)
    own = [transport.allocate_slab(layout.slabs[rank].nbytes) for _ in range(setting.num_layers)]
    for layer, slab in enumerate(own):
        fill(flat(slab), layout.slabs[rank], layer)
    pipe.send([transport.export_handle(slab) for slab in own])
    handles = receive(pipe)

    ring = Ring(setting.num_layers, setting.num_slots)
    slots = [transport.allocate_slot(plan.slot.nbytes) for _ in range(ring.used_slots)]
    engine = transport.copy_engine()
    programs = []
    for layer in range(setting.num_layers):
        slabs = {peer: transport.map_peer(handles[peer][layer]).address for peer in handles if peer != rank}
        slabs[rank] = own[layer].address
        programs.append(bind_plan(engine, plan, slabs, slots[ring.slot_of(layer)].address))
    counters = CounterPage.create(rank)
    prefetcher = Prefetcher(ring, engine, programs, counters, LIMIT_S)
    wrong = compare(prefetcher, [flat(slot) for slot in slots], plan.slot, setting, random.Random(rank))
    found = counters.snapshot()
    pipe.send(Outcome(wrong, found.layers, found.on_demand_fetches, found.pulled_bytes, plan.pulled_bytes, found.pulls))
    receive(pipe)
    prefetcher.close(LIMIT_S)
    engine.close(LIMIT_S)
    transport.close()


def compare(
    prefetcher: Prefetcher, slots: list[NDArray[np.uint8]], layout: Layout, setting: Setting, rng: random.Random
) -> int:
    """Forwards, some of them aborted; returns how many acquired layers were wrong at either end of their use."""
    expected = []
    for layer in range(setting.num_layers):
        expected.append(np.zeros(layout.nbytes, np.uint8))
        fill(expected[-1], layout, layer)
    wrong = 0
    prefetcher.start()
    for _ in range(setting.forwards):
        last = rng.randrange(setting.num_layers) if rng.random() < 0.1 else None
        for layer in range(setting.num_layers):
            prefetcher.acquire(layer)
            seen = slots[prefetcher.slot_of(layer)]
            right = bool((seen == expected[layer]).all())
            np.sort(seen)  # compute, for some time
            wrong += not (right and bool((seen == expected[layer]).all()))
            if layer == last:
                break
            prefetcher.release(layer)
    return wrong
