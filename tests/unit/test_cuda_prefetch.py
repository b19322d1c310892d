"""The real prefetcher, ring, plans, transport and copy engine over simulated CUDA: every acquired layer byte by byte."""

import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cuda_pair import KINDS
from tests.unit.cuda_rank import Rank, close_ranks, start_ranks
from tests.unit.fake_cuda import Machine
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
    st.booleans(),
    st.sampled_from(KINDS),
)
def test_every_byte_is_right(
    seed: int, layers: int, slots: int, num_ranks: int, num_devices: int, graphs: bool, kind: str
) -> None:
    machine = Machine(seed, num_devices)
    ring = Ring(layers, slots)
    ranks = start_ranks(machine, num_ranks, 5, ring, CopyOptions(graphs), kind=kind)
    play(machine, ranks, 4)
    for rank in ranks:
        assert rank.compared and rank.wrong == 0
        assert rank.page.fields.pulled_bytes == rank.page.fields.pulls * rank.plan.pulled_bytes
    close_ranks(ranks)
    gc.collect()
    assert machine.freed_while_mapped == 0 and machine.used == [0] * num_devices


@pytest.mark.parametrize("broken", ["submit", "acquire"])
def test_the_harness_catches_a_missing_wait(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1)
    ranks = start_ranks(machine, 2, 5, Ring(5, 2), CopyOptions(graphs=False))
    for rank in ranks:
        device, original = rank.device, rank.device.wait_event

        def wait_event(stream, event, device=device, original=original):  # type: ignore[no-untyped-def]
            if broken != ("acquire" if stream == device.current else "submit"):
                original(stream, event)

        monkeypatch.setattr(device, "wait_event", wait_event)
    play(machine, ranks, 12)
    assert sum(rank.wrong for rank in ranks) > 0


def test_a_step_makes_no_event_and_no_copy_call() -> None:
    machine = Machine(2)
    ranks = start_ranks(machine, 2, 6, Ring(6, 2), CopyOptions())
    machine.frozen = True  # the host runs ahead of the device by whole forwards, which takes the most events
    for rank in ranks:
        rank.prefetcher.start()
        for layer in [*range(6)] * 3:
            rank.play(layer, False)
    machine.frozen = False
    machine.drain()
    play(machine, ranks, 1)  # waits are read some at a time
    before = [dict(rank.device.calls) for rank in ranks]
    for _ in range(6):
        play(machine, ranks, 1)
    for rank, calls in zip(ranks, before, strict=True):
        for name in ("copy_async", "begin_capture", "make_stream", "make_event", "malloc"):
            assert rank.device.calls[name] == calls[name]
        assert rank.device.calls["launch"] > calls["launch"]
    close_ranks(ranks)
