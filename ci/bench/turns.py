"""Engines that are there at the same time and take turns, so that what two of them took in one turn can be compared."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ci.bench.engine import Engine, EngineFailed

WARM = 4  # turns, so that each of two ranks has had two
#: The jobs that others are compared with, if they are there.
PLAIN = ("plain", "plain again")


class Job(NamedTuple):
    """An engine and what is timed in it. dwdp: its settings; None is plain vLLM. gpu: the only one it sees."""

    name: str
    dwdp: dict[str, Any] | None
    options: dict[str, Any]
    steps: tuple[str, ...]
    gpu: int | None = None


class Group:
    """rows: what each engine took, as the JSON file has it; turn by turn the same turns for all that did not fail."""

    def __init__(self, jobs: list[Job], save: Callable[[dict[str, dict[str, Any]]], None], limit_s: float) -> None:
        """save: called with the rows after each size of a step. limit_s: an engine that takes longer is ended."""
        self.jobs = {job.name: job for job in jobs}
        self.rows: dict[str, dict[str, Any]] = {job.name: {} for job in jobs}
        self._save, self._limit_s = save, limit_s
        self._engines: dict[str, Engine] = {}

    def start(
        self, options: Callable[[Job], dict[str, Any]], env: Callable[[Job], dict[str, str]], folder: Path
    ) -> None:
        """All engines at the same time; returns when they are there or have failed. folder: of their logs."""
        for job in self.jobs.values():
            self._engines[job.name] = Engine(options(job), env(job), folder / f"{job.name.replace(' ', '-')}.log")
        for name in list(self._engines):
            if found := self._attempt(name, self._answer):
                self.rows[name]["start_s"] = round(found["start_s"], 1)

    def prefill(self, lengths: list[int], turns: int) -> None:
        """One prompt at a time, by length."""
        self._prompts("prefill", lambda: self._alone("prefill"), 1, lengths, turns)

    def pairs(self, lengths: list[int], turns: int) -> None:
        """A prompt on each of two ranks, and on each of two plain engines, at a time."""
        self._prompts("pairs", self._pairs, 2, lengths, turns)

    def _prompts(
        self, step: str, units: Callable[[], list[list[str]]], each: int, lengths: list[int], turns: int
    ) -> None:
        """`each`: prompts that a unit of engines has at a time."""
        for length in lengths:

            def ask(unit: list[str], turn: int, length: int = length) -> list[dict[str, Any]]:
                return self._ask(unit, "prefill", length=length, prompts=each // len(unit), seed=turn)

            for taken in self._turns(step, units, turns, ask):
                for name, found in taken.items():
                    _add(self.rows[name], step, length, found)
            self._save(self.rows)

    def decode(self, batches: list[int], turns: int) -> None:
        """By requests at once: on both ranks of DWDP, on the one GPU of plain vLLM."""
        for batch in batches:

            def ask(unit: list[str], turn: int, batch: int = batch) -> list[dict[str, Any]]:
                return self._ask(unit, "decode", batch=batch)

            for taken in self._turns("decode", lambda: self._alone("decode"), turns, ask):
                for name, [found] in taken.items():
                    cell = self.rows[name].setdefault("decode", {}).setdefault(str(batch), {"all": []})
                    cell["all"].append(found["tokens_per_s"])
                    cell["tokens_per_s"] = statistics.median(cell["all"])
            self._save(self.rows)

    def profile(self, length: int) -> None:
        """A prompt of each engine under torch's profiler, after everything that is timed."""
        for name in list(self._engines):
            for _ in range(2):  # the first one starts the profiler up
                if found := self._ask([name], "profile", length=length):
                    self.rows[name]["profile"] = found[0]
        self._save(self.rows)

    def stop(self) -> None:
        """End all engines."""
        for engine in self._engines.values():
            engine.leave()
        for engine in self._engines.values():
            engine.stop()

    def _alone(self, step: str) -> list[list[str]]:
        """Units of one engine each."""
        return [[name] for name in self._engines if step in self.jobs[name].steps]

    def _pairs(self) -> list[list[str]]:
        """Two plain engines are a unit, where both are there; one alone is nothing to compare with."""
        alone = self._alone("pairs")
        plain = [name for [name] in alone if name in PLAIN]
        return [[name] for [name] in alone if self.jobs[name].dwdp is not None] + ([plain] if len(plain) == 2 else [])

    def _turns(
        self,
        step: str,
        units: Callable[[], list[list[str]]],
        turns: int,
        ask: Callable[[list[str], int], list[dict[str, Any]]],
    ) -> Iterator[dict[str, list[dict[str, Any]]]]:
        """By turn what each unit of engines found, by the first of them. One in which an engine fails counts for none."""
        rng = random.Random(step)
        for turn in range(WARM + turns):
            now = units()
            taken = {unit[0]: ask(unit, turn) for unit in rng.sample(now, len(now))}
            if turn >= WARM and all(len(taken[unit[0]]) == len(unit) for unit in now):
                yield taken

    def _ask(self, names: list[str], step: str, **words: Any) -> list[dict[str, Any]]:
        """The step on all `names` at the same time; what those found that did not fail."""

        def begin(engine: Engine) -> dict[str, Any]:
            engine.ask(step, **words)
            return {"asked": True}

        asked = [name for name in names if self._attempt(name, begin)]
        return [found for name in asked if (found := self._attempt(name, self._answer))]

    def _answer(self, engine: Engine) -> dict[str, Any]:
        return engine.answer(self._limit_s)

    def _attempt(self, name: str, call: Callable[[Engine], dict[str, Any]]) -> dict[str, Any] | None:
        """None, and out of the group, where the engine fails or has failed."""
        if name not in self._engines:
            return None
        try:
            return call(self._engines[name])
        except EngineFailed as error:
            self.rows[name]["error"] = str(error)
            self._engines.pop(name).stop(1)
            print(f"gpu prefill: {name}: {error}", flush=True)
            return None


def _add(row: dict[str, Any], step: str, length: int, found: list[dict[str, Any]]) -> None:
    """A turn of one engine, or of two at a time: the slower one's seconds, and a worker's mean time of its steps."""
    cell = row.setdefault(step, {}).setdefault(str(length), {"seconds": []})
    cell["seconds"].append(max(item["seconds"] for item in found))
    cell["median_s"] = statistics.median(cell["seconds"])
    workers = 2 if step == "pairs" else 1
    for kind in ("host_s", "device_s"):
        told = [each[kind] for item in found for each in item["steps"] if kind in each]
        if told:
            cell.setdefault(f"steps_{kind}", []).append(sum(told) / workers)
    for key in ("exposed_s", "waits", "pulled_bytes"):
        if key in found[0]:
            cell[key] = cell.get(key, 0) + found[0][key]


def ratios(base: list[list[float]], mine: list[float]) -> list[float]:
    """By turn: the mean of the plain engines over this one's."""
    return [statistics.fmean(turn[:-1]) / turn[-1] for turn in zip(*base, mine, strict=False)]


def bounds(values: list[float]) -> tuple[float, float, float]:
    """(median, lower, upper 95 % bound) of the median, by drawing turns again: of these engines, not of others like them."""
    rng = random.Random(0)
    drawn = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(1000))
    return statistics.median(values), drawn[25], drawn[974]
