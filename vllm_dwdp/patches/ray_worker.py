"""`ray_executor_v2.RayWorkerProc` and `CpuPlatform.ray_device_key`: Ray-launched workers on CPU.

Why: vLLM's Ray code asks the platform for the name of its Ray device and refuses CPUs, which have none. Active only while
a `DwdpRayExecutor` sets up on CPU, in its engine process. Goes when vLLM supports Ray on CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vllm_dwdp.errors import DwdpError


@contextlib.contextmanager
def cpu_workers(worker_class: type) -> Iterator[None]:
    """Let `RayExecutorV2` place its worker by CPU and create a `worker_class`; both symbols are put back."""
    from vllm.platforms import current_platform
    from vllm.v1.executor import ray_executor_v2

    platform = type(current_platform)
    if platform.ray_device_key:
        raise DwdpError(f"{platform.__name__} has the Ray device {platform.ray_device_key!r}; expected none on CPU")
    worker = ray_executor_v2.RayWorkerProc
    platform.ray_device_key = "CPU"
    ray_executor_v2.RayWorkerProc = worker_class  # type: ignore[misc]
    try:
        yield
    finally:
        ray_executor_v2.RayWorkerProc = worker  # type: ignore[misc]
        del platform.ray_device_key
