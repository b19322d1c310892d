"""Layers that the warm-up, or a first forward, left out: the worker seals them and names them once."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import hits_writer, worker
from vllm_dwdp.engine.hits_writer import HitsWriter


class Hits:
    """What the worker asks of the counts of hits."""

    resets = 0

    def reset(self) -> None:
        self.resets += 1

    def read(self) -> None:
        raise RuntimeError("the device is gone")


class Sharing:
    """What the worker asks of an ExpertSharing."""

    def __init__(self, view: str) -> None:
        self.view, self.layers, self.sealed = view, ["a", "b", "c"], 0
        self.left: list[str] = list(self.layers)
        self.hits = Hits()
        self.counted: list[int] = []
        self.forwards = SimpleNamespace(reset=self.counted.clear)
        self.met: list[list[int]] = []

    def unused(self) -> list[str]:
        return list(self.left)

    def seal_unused(self) -> None:
        self.sealed += 1

    def count(self, tokens: int) -> None:
        self.counted.append(tokens)

    def warmed_up(self, rendezvous: Any, group: list[int]) -> None:
        self.met.append(group)

    def close(self) -> None:
        self.closed = True


class Base:
    """A worker of vLLM, whose warm-up and forwards use what the test says."""

    warm: tuple[str, ...] = ()

    def use(self, names: tuple[str, ...]) -> None:
        self.dwdp_sharing.left = [name for name in self.dwdp_sharing.left if name not in names]  # type: ignore[attr-defined]

    def compile_or_warm_up_model(self) -> str:
        self.use(self.warm)
        return "times"

    def execute_model(self, scheduler_output: Any, *names: str) -> str:
        self.use(names)
        self.seen = scheduler_output.total_num_scheduled_tokens  # counted by then
        assert self.dwdp_sharing.counted[-1:] == [self.seen] or not self.seen  # type: ignore[attr-defined]
        return "output"

    def shutdown(self) -> None:
        self.ended = True


def step(tokens: int) -> Any:
    """Of vLLM's scheduler."""
    return SimpleNamespace(total_num_scheduled_tokens=tokens)


@pytest.mark.parametrize(("view", "words"), [("contiguous", "NaN"), ("inplace", "in place")])
@pytest.mark.parametrize("warm", [True, False])
def test_layers_that_were_left_out_are_named_once(
    view: str, words: str, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    told: list[int] = []
    monkeypatch.setattr(worker.logger, "warning", lambda text, *values: warnings.append(text % values))

    class Made(worker.DwdpWorkerMixin, Base):
        def __init__(self) -> None:
            self.dwdp_rank = 3
            self.dwdp_sharing = Sharing(view)  # type: ignore[assignment]
            self.dwdp_waits = SimpleNamespace(add=told.append)  # type: ignore[assignment]
            self.dwdp_rendezvous: Any = None
            self.dwdp_launch: Any = SimpleNamespace(group_of=lambda rank: [2, rank])
            self.warm = ("a", "c") if warm else ()

    made: Any = Made()
    assert made.compile_or_warm_up_model() == "times" and made.dwdp_sharing.sealed == 1
    assert len(warnings) == warm and made.dwdp_sharing.met == [[2, 3]]
    # What the warm-up hit is none of the requests' doing.
    assert made.dwdp_sharing.hits.resets == 1
    # A step without tokens, as for transfers of KV blocks, is no forward.
    steps = [(step(0),), (step(7), "a", "c"), (step(0),), (step(1),), (step(2),)]
    assert [made.execute_model(*arguments) for arguments in steps] == ["output"] * 5
    assert made.dwdp_sharing.counted == told == [7, 1, 2]
    assert len(warnings) == 1 and "execute_model" not in vars(made)
    assert all(part in warnings[0] for part in ("rank 3", "1 of 3", "forward: b;", words))
    # Its thread would go on to say in other tests that hits are lost.
    made.dwdp_hits_writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "dwdp-hits"]


def test_hits_that_cannot_be_read_keep_no_worker_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(hits_writer.logger, "warning", lambda text, *values: warnings.append(text % values))

    class Made(worker.DwdpWorkerMixin, Base):
        def __init__(self) -> None:
            sharing: Any = Sharing("contiguous")
            self.dwdp_rank = 3
            self.dwdp_launch = SimpleNamespace(config=DwdpConfig(hits="hits.json"))  # type: ignore[assignment]
            self.dwdp_sharing = sharing
            self.dwdp_hits_writer = HitsWriter(sharing.hits.read, self._dwdp_write_hits, 3)

    made: Any = Made()
    sharing = made.dwdp_sharing
    made.shutdown()
    assert sharing.closed and made.ended
    assert warnings == ["dwdp rank 3: hits are lost: the device is gone"]
