"""CUDA graphs of whole forwards on simulated CUDA: bytes and counts of forwards that skip and repeat layers, in any turns
with eager ones and with captures that are aborted (test_cuda_captures.py)."""

from __future__ import annotations

import gc
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cuda_forwards import Graph, abort_capture, at_home, capture, counted, eager, replay, run_copies
from tests.unit.cuda_rank import LIMIT_S, close_ranks, start_ranks
from tests.unit.fake_cuda import Machine
from vllm_dwdp.errors import DwdpTimeout
from vllm_dwdp.prefetch.replays import NO_LAYERS
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.cuda_copy import CopyOptions


@pytest.mark.parametrize(
    ("order", "layers", "slots"),
    [
        ((0, 1, 2), 4, 2),
        ((0, 2, 4), 6, 3),
        ((0, 1, 2, 0), 3, 2),
        ((1,), 3, 2),
        ((2, 1, 0), 5, 2),
        ((0, 1, 2, 3), 4, 2),
    ],
)
def test_every_replay_of_a_forward_that_skips_or_repeats_layers_is_right(
    order: tuple[int, ...], layers: int, slots: int
) -> None:
    machine = Machine(7)
    ranks = start_ranks(machine, 2, 5, Ring(layers, slots), CopyOptions())
    rank = ranks[0]
    rank.prefetcher.start()
    eager(rank, order)
    machine.drain()
    assert rank.compared and rank.wrong == 0
    graph = capture(rank, order)
    for number in range(1, 5):
        compared, before = rank.compared, counted(rank)
        replay(rank, graph)
        machine.drain()
        assert rank.wrong == 0, f"replay {number}"
        assert rank.compared == compared + 6 * len(order)
        added = counted(rank).since(before)
        assert added == graph.counts and added.layers == len(order)
        assert added.pulled_bytes == added.pulls * rank.plan.pulled_bytes
        assert at_home(rank)
    rank.device.destroy_graph(graph.number)
    close_ranks(ranks)


def test_align_refills_a_slot_only_behind_its_last_use() -> None:
    """The copy stream runs ahead as far as it may, and compute after it: the worst order there is."""
    machine = Machine(9)
    ranks = start_ranks(machine, 2, 5, Ring(4, 2), CopyOptions())
    rank = ranks[0]
    rank.prefetcher.start()
    eager(rank, (0, 1))
    machine.drain()
    machine.frozen = True
    for layer in (2, 3):  # aborted: both slots are in use
        rank.prefetcher.acquire(layer)
        rank.use(layer)
    rank.prefetcher.align()
    run_copies(rank)
    machine.frozen = False
    machine.drain()
    assert rank.compared == 4 * 6 and rank.wrong == 0
    close_ranks(ranks)


def test_a_graph_brings_slots_home_only_behind_their_last_use() -> None:
    """The same inside a graph, whose nodes run in any order that their edges allow."""
    for seed in range(8):
        machine = Machine(seed)
        ranks = start_ranks(machine, 2, 5, Ring(4, 2), CopyOptions())
        rank = ranks[0]
        rank.prefetcher.start()
        graph = capture(rank, (0, 1, 2))
        rank.use(0)  # eager compute in front, which reads what replays overwrite
        replay(rank, graph)
        machine.drain()
        assert rank.wrong == 0
        nodes = rank.device.graphs[graph.number]
        roots = [node for node in nodes if not node.after]
        assert len(roots) == 1, "a copy of the graph waits for nothing"
        rank.device.destroy_graph(graph.number)
        close_ranks(ranks)


def test_a_device_that_stands_still_ends_in_an_error_within_the_limit() -> None:
    """Forwards and replays go on as long as the host may, and then say so; afterwards all goes on."""
    for through_graphs in (False, True):
        machine = Machine(10)
        ranks = start_ranks(machine, 2, 5, Ring(4, 2), CopyOptions(timeout_s=0.3))
        rank = ranks[0]
        rank.prefetcher.start()
        graph = capture(rank, range(4))
        machine.drain()
        machine.frozen = True
        begun = time.monotonic()
        with pytest.raises(DwdpTimeout, match="not done after"):
            while time.monotonic() - begun < 20:
                if through_graphs:
                    eager(rank, (0,))  # leaves a pull that the replay has to wait for
                    replay(rank, graph)
                else:
                    eager(rank, range(4))
                time.sleep(0.01)
        assert 0.29 < time.monotonic() - begun < 10
        machine.frozen = False
        machine.drain()
        eager(rank, range(4))
        machine.drain()
        assert rank.wrong == 0
        rank.device.destroy_graph(graph.number)
        close_ranks(ranks)


def test_the_harness_catches_a_replay_that_is_not_aligned() -> None:
    machine = Machine(3)
    (rank, _) = ranks = start_ranks(machine, 2, 5, Ring(6, 2), CopyOptions())
    rank.prefetcher.start()
    graph = capture(rank, range(6))
    eager(rank, range(3))  # aborted: slots hold layers 4 and 3, or are being filled
    machine.drain()
    assert rank.wrong == 0
    rank.device.launch(graph.number, 0)
    machine.drain()
    assert rank.wrong > 0
    rank.device.destroy_graph(graph.number)
    close_ranks(ranks)


def test_each_graph_counts_what_it_holds() -> None:
    machine = Machine(5)
    ranks = start_ranks(machine, 2, 5, Ring(4, 2), CopyOptions())
    rank = ranks[0]
    rank.prefetcher.start()
    whole, part, drafter = capture(rank, range(4)), capture(rank, (0, 2)), capture(rank, ())
    assert drafter.counts is NO_LAYERS and counted(rank).forwards == 0
    for graph, times in ((whole, 3), (drafter, 9), (part, 2), (drafter, 5), (whole, 1)):
        for _ in range(times):
            replay(rank, graph)
    machine.drain()
    found = counted(rank)
    assert (found.forwards, found.layers, found.unmeasured) == (4 + 2, 4 * 4 + 2 * 2, 4 * 4 + 2 * 2)
    assert whole.counts.pulls == 4 and part.counts.pulls == 2
    assert found.pulls == 2 + 4 * 4 + 2 * 2 and found.pulled_bytes == found.pulls * rank.plan.pulled_bytes
    assert rank.wrong == 0
    for graph in (whole, part, drafter):
        rank.device.destroy_graph(graph.number)
    close_ranks(ranks)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 4), st.integers(1, 3))
def test_any_graphs_in_any_turns(data: st.DataObject, seed: int, layers: int, slots: int, in_flight: int) -> None:
    """Graphs of several batch sizes, each of an order of its own, made at any time, replayed in turns with eager forwards
    of any order, some of them aborted, and with aborted captures."""
    machine = Machine(seed)
    ranks = start_ranks(machine, 2, 5, Ring(layers, slots), CopyOptions(in_flight))
    rng = machine.rng

    def order() -> list[int]:
        """A whole forward, one that skips layers, one that repeats some, or any."""
        kind, whole = rng.randrange(4), list(range(layers))
        if kind == 1:
            return [layer for layer in whole if rng.random() < 0.6]
        if kind == 2:
            return [layer for layer in whole for _ in range(rng.choice((1, 1, 2)))] + [rng.choice(whole)]
        return whole if kind == 0 else [rng.choice(whole) for _ in range(rng.randrange(6))]

    graphs: dict[int, list[Graph]] = {}
    for rank in ranks:
        rank.prefetcher.start()
        graphs[id(rank)] = [capture(rank, order()) for _ in range(3)]
        assert rank.compared == 0 and counted(rank).forwards == 0
    for turn in data.draw(st.lists(st.integers(0, 9), min_size=8, max_size=24)):
        rank = rng.choice(ranks)
        mine, before = graphs[id(rank)], counted(rank)
        machine.wander(6)
        if turn < 5:
            graph = rng.choice(mine)
            home = all(slot.holds == slot.number for slot in rank.prefetcher._slots)
            replay(rank, graph)
            added = counted(rank).since(before)
            assert added.layers == len(graph.order) and (added.pulls == graph.counts.pulls or not home)
        elif turn < 8:
            eager(rank, order(), aborted=rng.random() < 0.4)
        elif turn == 8:
            abort_capture(rank, order() or [0], released=rng.random() < 0.5)
        else:
            mine.append(capture(rank, order()))
    machine.drain()
    for rank in ranks:
        assert rank.wrong == 0
        eager(rank, range(layers))
        machine.drain()
        assert rank.compared and rank.wrong == 0
        for graph in graphs[id(rank)]:
            rank.device.destroy_graph(graph.number)
        assert rank.page.fields.pulled_bytes == rank.page.fields.pulls * rank.plan.pulled_bytes
        rank.prefetcher.close(LIMIT_S)
    close_ranks(ranks)
    gc.collect()
