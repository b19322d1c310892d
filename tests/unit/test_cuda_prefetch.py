"""The real prefetcher, ring, plans, transport and copy engine over simulated CUDA: every acquired layer byte by byte."""

import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cuda_rank import Rank, close_ranks, start_ranks
from tests.unit.fake_cuda import Machine
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.prefetch.ring import Ring
from vllm_dwdp.transport.cuda_copy import CopyOptions


def play(machine: Machine, ranks: list[Rank], forwards: int) -> None:
    """Forwards of all ranks, interleaved at random, some aborted, then everything to its end."""
    todo = {}
    for rank in ranks:
        num_layers = len(rank.expected)
        uses: list[tuple[int, bool]] = []
        for _ in range(forwards):
            aborted = rank.rng.randrange(num_layers) if rank.rng.random() < 0.3 else None
            for layer in range(num_layers):
                uses.append((layer, layer == aborted))
                if layer == aborted:
                    break
            if rank.rng.random() < 0.2:
                uses.append((rank.rng.randrange(num_layers), False))
        todo[id(rank)] = uses[::-1]
        rank.prefetcher.start()
    while busy := [rank for rank in ranks if todo[id(rank)]]:
        rank = machine.rng.choice(busy)
        rank.play(*todo[id(rank)].pop())
    machine.drain()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 7),
    st.integers(2, 4),
    st.integers(2, 3),
    st.integers(1, 2),
    st.integers(1, 8),
    st.booleans(),
)
def test_every_byte_is_right(
    seed: int, layers: int, slots: int, num_ranks: int, num_devices: int, in_flight: int, graphs: bool
) -> None:
    machine = Machine(seed, num_devices)
    ring = Ring(layers, slots)
    ranks = start_ranks(machine, num_ranks, 5, ring, CopyOptions(in_flight, graphs))
    play(machine, ranks, 4)
    for rank in ranks:
        assert rank.compared and rank.wrong == 0
        assert rank.page.fields.pulled_bytes == rank.page.fields.pulls * rank.plan.pulled_bytes
    close_ranks(ranks)
    gc.collect()
    assert machine.freed_while_mapped == 0 and machine.used == [0] * num_devices


@pytest.mark.parametrize("broken", ["submit", "acquire", "fork", "join"])
def test_the_harness_catches_a_missing_wait(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1)
    ranks = start_ranks(machine, 2, 5, Ring(5, 2), CopyOptions(4, graphs=False))
    for rank in ranks:
        device, engine, original = rank.device, rank.engine, rank.device.wait_event

        def wait_event(stream, event, device=device, engine=engine, original=original):  # type: ignore[no-untyped-def]
            first = engine._streams[0]
            kind = "acquire" if stream == device.current else "fork" if stream != first else "submit"
            kind = "join" if event in engine._joins else kind
            if kind != broken:
                original(stream, event)

        monkeypatch.setattr(device, "wait_event", wait_event)
    play(machine, ranks, 12)
    assert sum(rank.wrong for rank in ranks) > 0


def test_a_step_makes_no_event_and_no_copy_call() -> None:
    machine = Machine(2)
    ranks = start_ranks(machine, 2, 6, Ring(6, 2), CopyOptions(2))
    machine.frozen = True  # the host runs ahead of the device by whole forwards, which takes the most events
    for rank in ranks:
        rank.prefetcher.start()
        for layer in [*range(6)] * 3:
            rank.play(layer, False)
    machine.frozen = False
    machine.drain()
    before = [dict(rank.device.calls) for rank in ranks]
    for _ in range(6):
        play(machine, ranks, 1)
    for rank, calls in zip(ranks, before, strict=True):
        for name in ("copy_async", "begin_capture", "make_stream", "make_event", "malloc"):
            assert rank.device.calls[name] == calls[name]
        assert rank.device.calls["launch"] > calls["launch"]
    close_ranks(ranks)


def capture(rank: Rank) -> int:
    """The graph of a whole forward of `rank`."""
    rank.prefetcher.align()
    rank.device.begin_torch_capture()
    for layer in range(len(rank.expected)):
        rank.prefetcher.acquire(layer)
        rank.use(layer)
        rank.prefetcher.release(layer)
    rank.prefetcher.end_capture()
    return rank.device.end_torch_capture()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(2, 4), st.integers(1, 3))
def test_graphs_of_whole_forwards_take_turns_with_eager_ones(
    seed: int, layers: int, slots: int, in_flight: int
) -> None:
    machine = Machine(seed)
    ring = Ring(layers, slots)
    ranks = start_ranks(machine, 2, 5, ring, CopyOptions(in_flight))
    for rank in ranks:
        rank.prefetcher.start()
    graphs = {id(rank): [capture(rank) for _ in range(2)] for rank in ranks}  # as for two batch sizes
    refilled = sum(ring.next_layer(layer) is not None for layer in range(layers))
    for rank in ranks:
        fields = rank.page.fields
        assert (fields.forwards, fields.layers, fields.unmeasured) == (0, 0, 0)
        assert rank.compared == 0
    for _ in range(24):
        rank = machine.rng.choice(ranks)
        fields = rank.page.fields
        before = (fields.forwards, fields.layers, fields.unmeasured, fields.pulls)
        if machine.rng.random() < 0.5:
            at_home = all(slot.holds == slot.number for slot in rank.prefetcher._slots)
            rank.prefetcher.align()
            rank.device.launch(machine.rng.choice(graphs[id(rank)]), 0)
            after = (fields.forwards, fields.layers, fields.unmeasured)
            assert after == (before[0] + 1, before[1] + layers, before[2] + layers)
            assert fields.pulls >= before[3] + refilled and (fields.pulls == before[3] + refilled) == at_home
        else:  # an eager forward, one in three of them aborted
            aborted = machine.rng.randrange(layers) if machine.rng.random() < 0.3 else None
            for layer in range(layers):
                rank.play(layer, layer == aborted)
                if layer == aborted:
                    break
    machine.drain()
    assert all(rank.compared and rank.wrong == 0 for rank in ranks)
    for rank in ranks:
        assert rank.page.fields.pulled_bytes == rank.page.fields.pulls * rank.plan.pulled_bytes
        for graph in graphs[id(rank)]:
            rank.device.destroy_graph(graph)
    close_ranks(ranks)


def test_the_harness_catches_a_replay_that_is_not_aligned() -> None:
    machine = Machine(3)
    (rank, _) = ranks = start_ranks(machine, 2, 5, Ring(6, 2), CopyOptions())
    rank.prefetcher.start()
    graph = capture(rank)
    for layer in range(3):  # aborted: slots hold layers 4 and 3, or are being filled
        rank.play(layer, False)
    machine.drain()
    assert rank.wrong == 0
    rank.device.launch(graph, 0)
    machine.drain()
    assert rank.wrong > 0
    rank.device.destroy_graph(graph)
    close_ranks(ranks)


def test_what_a_failed_capture_left_is_fetched_again() -> None:
    machine = Machine(4)
    ranks = start_ranks(machine, 2, 5, Ring(4, 2), CopyOptions())
    rank = ranks[0]
    rank.prefetcher.start()
    machine.drain()
    rank.prefetcher.align()
    rank.device.begin_torch_capture()
    rank.prefetcher.acquire(0)
    rank.prefetcher.release(0)
    with pytest.raises(DwdpError, match="cudaErrorStreamCaptureUnjoined"):
        rank.device.end_torch_capture()
    rank.device.current = 0
    with pytest.raises(DwdpError, match="a CUDA graph capture ended without its copies"):
        rank.prefetcher.acquire(2)
    for layer in range(4):
        rank.play(layer, False)
    machine.drain()
    assert rank.compared and rank.wrong == 0
    for stream in [s for s in rank.device.streams if s and s not in rank.engine._streams]:
        rank.device.destroy_stream(stream)
    close_ranks(ranks)


def test_a_capture_without_layers_counts_nothing() -> None:
    machine = Machine(5)
    ranks = start_ranks(machine, 2, 5, Ring(4, 2), CopyOptions())
    rank, fields = ranks[0], ranks[0].page.fields
    rank.prefetcher.start()
    graph = capture(rank)
    rank.prefetcher.align()  # as for the graph of a drafter
    rank.prefetcher.end_capture()
    assert fields.forwards == 0
    rank.prefetcher.align()
    rank.device.launch(graph, 0)
    machine.drain()
    assert (fields.forwards, fields.layers) == (1, 4)
    rank.device.destroy_graph(graph)
    close_ranks(ranks)
