"""An engine in processes of its own that does one thing at a time when asked, so that several can take turns."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ci.root import ROOT

DECODED = 64


class EngineFailed(Exception):
    """An engine ended, or did not answer in time."""


class Engine:
    """A client's side. `ask` may be called on several engines before `answer` is: they then work at the same time."""

    def __init__(self, options: dict[str, Any], env: dict[str, str], log: Path) -> None:
        """options: of `LLM`, with the model. env: set before vLLM is imported. Returns before the engine has started."""
        self._log = log
        self._conn, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, options, env, log))
        self._process.start()
        theirs.close()

    def ask(self, step: str, **words: Any) -> None:
        """Begin a step: `Served`'s methods."""
        try:
            self._conn.send((step, words))
        except OSError:
            raise EngineFailed(self._why("has ended")) from None

    def answer(self, limit_s: float) -> dict[str, Any]:
        """What the step begun last found. Raises EngineFailed."""
        if not self._conn.poll(limit_s):
            raise EngineFailed(self._why(f"gave no answer in {limit_s:.0f} s"))
        try:
            found: dict[str, Any] = self._conn.recv()
        except (EOFError, OSError):
            raise EngineFailed(self._why("has ended")) from None
        if "error" in found:
            raise EngineFailed(self._why(found["error"]))
        return found

    def leave(self) -> None:
        """Ask it to end; returns at once."""
        with contextlib.suppress(OSError):
            self._conn.send(None)

    def stop(self, limit_s: float = 30) -> None:
        """End it and all that it started, by force after `limit_s`."""
        self.leave()
        self._process.join(limit_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.pid is not None:
                os.killpg(self._process.pid, signal.SIGKILL)
        # Its group is its own only once it runs.
        self._process.kill()
        self._process.join(limit_s)

    def _why(self, what: str) -> str:
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        lines = [line for line in text.splitlines() if "Error" in line]
        return f"{what}: {' / '.join(lines[:4])[:600]}"


def serve(conn: Connection, options: dict[str, Any], env: dict[str, str], log: Path) -> None:
    """In a process of its own: start the engine, then do what `conn` says until it says None."""
    os.setsid()
    os.environ.update(env)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.path.insert(0, str(ROOT))
    try:
        served = Served(options)
        conn.send({"start_s": served.start_s})
        while (order := conn.recv()) is not None:
            step, words = order
            conn.send(getattr(served, step)(**words))
        # At its end multiprocessing waits for child processes before anything else could end them.
        served.close()
    except EOFError:
        _end_all()  # whoever asked has gone
    except BaseException as error:
        with contextlib.suppress(OSError):
            conn.send({"error": f"{type(error).__name__}: {error}"[:600]})
        traceback.print_exc()
        _end_all()


def _end_all() -> None:
    """This process and those that it started, which multiprocessing would wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.killpg(0, signal.SIGKILL)


class Served:
    """The steps that an engine can be asked for."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        begun = time.monotonic()
        self._llm = LLM(worker_extension_cls="ci.bench.step_times.StepTimes", **options)
        self.start_s = time.monotonic() - begun
        self._llm.collective_rpc("begin_step_times", args=(current_platform.is_cuda(),))

    def prefill(self, length: int, prompts: int, seed: int) -> dict[str, Any]:
        """Prompts of `length` tokens at once, a token of output each: seconds, the workers' steps, this call's waits."""
        rng = random.Random(seed)
        batch = [[rng.randrange(100, 200) for _ in range(length)] for _ in range(prompts)]
        before = waits(self._llm)
        seconds = self._generate(batch, 1)
        steps = [step for worker in self._llm.collective_rpc("read_step_times") for step in worker]
        return {"seconds": seconds, "steps": steps, **{k: v - before[k] for k, v in waits(self._llm).items()}}

    def decode(self, batch: int) -> dict[str, Any]:
        """Greedy tokens per second of `batch` requests at once."""
        seconds = self._generate([[100 + i, 101, 102, 103] for i in range(batch)], DECODED)
        self._llm.collective_rpc("read_step_times")
        return {"tokens_per_s": batch * DECODED / seconds}

    def profile(self, length: int) -> dict[str, Any]:
        """A prompt under torch's profiler, by worker."""
        self._llm.collective_rpc("begin_profile")
        seconds = self._generate([[100 + i % 97 for i in range(length)]], 1)
        found = self._llm.collective_rpc("read_profile")
        self._llm.collective_rpc("read_step_times")
        return {"seconds": seconds, "workers": found}

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.llm_engine.engine_core.shutdown()

    def _generate(self, batch: list[list[int]], tokens: int) -> float:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        begun = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": ids} for ids in batch], params, use_tqdm=False)
        return time.perf_counter() - begun


def waits(llm: Any) -> dict[str, float]:
    """Sums over ranks; nothing with plain vLLM."""
    import vllm_dwdp

    try:
        ranks = vllm_dwdp.counters(llm)
    except Exception:
        return {}
    return {
        "exposed_s": sum(rank["exposed_wait_ns"] for rank in ranks) / 1e9,
        "waits": sum(rank["slot_waits"] for rank in ranks),
        "pulled_bytes": sum(rank["pulled_bytes"] for rank in ranks),
    }
