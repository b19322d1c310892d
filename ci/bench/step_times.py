"""A worker extension (`--worker-extension-cls`) that tells how long each step took, on the host and on the device.

The same in plain vLLM and in DWDP, with the worker in its engine's process or in one of its own: what lies between these
times and those that a client sees is the front end's, the scheduler's and the messages' between processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class StepTimes:
    """Methods for `LLM.collective_rpc`; nothing is measured before `begin_step_times`."""

    def begin_step_times(self, device: bool) -> None:
        """From now on keep the times of this worker's steps. device: those of its GPU too."""
        worker: Any = self
        worker.step_times_kept = []
        worker.step_times_device = device
        worker.execute_model = self._timed(worker.execute_model, begins=True)
        worker.sample_tokens = self._timed(worker.sample_tokens, begins=False)

    def read_step_times(self) -> list[dict[str, float]]:
        """Of each step since the last call: host_s from its begin to the end of its last call, device_s of the same on the
        compute stream. Waits for the device."""
        worker: Any = self
        kept, worker.step_times_kept = worker.step_times_kept, []
        found = []
        for step in kept:
            told = {"host_s": step["end"] - step["begin"]}
            if "last" in step:
                step["last"].synchronize()
                told["device_s"] = step["first"].elapsed_time(step["last"]) / 1e3
            found.append(told)
        return found

    def begin_profile(self) -> None:
        """Record what host and device do until `read_profile`."""
        import torch

        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        worker: Any = self
        worker.step_times_profile = torch.profiler.profile(activities=activities)
        worker.step_times_profile.__enter__()

    def read_profile(self, most: int = 14) -> dict[str, Any]:
        """What was recorded: milliseconds in which the device did anything, and what took longest there and on the host."""
        worker: Any = self
        profile = worker.step_times_profile
        profile.__exit__(None, None, None)
        spans, kernels, host = [], {}, {}
        for event in profile.events():
            if "CUDA" in str(event.device_type):
                spans.append((event.time_range.start, event.time_range.end))
                count, total = kernels.get(event.name[:90], (0, 0.0))
                kernels[event.name[:90]] = (count + 1, total + event.time_range.elapsed_us() / 1e3)
            else:
                count, total = host.get(event.name[:90], (0, 0.0))
                host[event.name[:90]] = (count + 1, total + event.self_cpu_time_total / 1e3)
        return {
            "busy_ms": _covered(spans) / 1e3,
            "span_ms": (max(end for _, end in spans) - min(start for start, _ in spans)) / 1e3 if spans else 0.0,
            "device": _longest(kernels, most),
            "host": _longest(host, most),
        }

    def _timed(self, call: Callable[..., Any], begins: bool) -> Callable[..., Any]:
        worker: Any = self

        def timed(*args: Any, **kwargs: Any) -> Any:
            if begins:
                worker.step_times_kept.append({"begin": time.perf_counter()})
                _mark(worker, "first")
            try:
                return call(*args, **kwargs)
            finally:
                if worker.step_times_kept:
                    worker.step_times_kept[-1]["end"] = time.perf_counter()
                    _mark(worker, "last")

        return timed


def _mark(worker: Any, name: str) -> None:
    if worker.step_times_device:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        worker.step_times_kept[-1][name] = event


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of `spans`."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _longest(times: dict[str, tuple[int, float]], most: int) -> list[tuple[str, int, float]]:
    """(name, how often, milliseconds), the longest first."""
    ordered = sorted(times.items(), key=lambda item: -item[1][1])
    return [(name, count, round(total, 3)) for name, (count, total) in ordered[:most]]
