"""Whole ranks in processes of their own: every byte of every acquired layer, through the real copy thread."""

from multiprocessing import get_context

import pytest

from tests.unit.helpers import LIMIT_S
from tests.unit.owner import receive
from tests.unit.rank import Outcome, Setting, run_rank


def run(setting: Setting) -> list[Outcome]:
    context = get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(setting.num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=run_rank, args=(there, rank, setting), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        handles = {rank: receive(pipe) for rank, pipe in enumerate(pipes)}
        for pipe in pipes:
            pipe.send(handles)
        outcomes = [receive(pipe) for pipe in pipes]
        for pipe in pipes:
            pipe.send("end")
        for process in processes:
            process.join(LIMIT_S)
        assert [process.exitcode for process in processes] == [0] * setting.num_ranks
        return outcomes
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    "setting",
    [
        Setting(num_ranks=2, num_experts=8, num_layers=5, num_slots=2, forwards=150),
        Setting(num_ranks=2, num_experts=7, num_layers=3, num_slots=2, forwards=150, slice_bytes=1 << 20),
        Setting(num_ranks=3, num_experts=8, num_layers=4, num_slots=3, forwards=100, experts_per_rank=4),
    ],
    ids=["two ranks", "uneven", "three ranks, overlap"],
)
def test_every_acquired_layer_is_right(setting: Setting) -> None:
    for outcome in run(setting):
        assert outcome.wrong == 0
        assert outcome.compared > setting.forwards * setting.num_layers * 0.7
        assert outcome.on_demand_fetches > 0  # forwards were aborted
        assert outcome.pulled_bytes == outcome.pulls * outcome.expected_pull_bytes
