"""Starting real engines for tests, and checking that nothing of them stays."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ci.checks.soak_processes import unused
from vllm_dwdp.engine.cores import physical_cores, split_cores

REPO = Path(__file__).resolve().parents[2]

#: KV cache of an engine on a GPU: ranks that share one need a fixed size.
KV_CACHE_BYTES = 256 << 20

#: Names under the temporary folder that vLLM, torch and Ray keep on purpose: caches and Ray's own logs.
_CACHES = ("torchinductor", "ray", "torch_", "vllm_cache", "tmp_torch", "pymp-", "pytest-")


def environment(**more: str) -> dict[str, str]:
    """This process's environment for an engine: small KV cache, no network, tests importable in workers."""
    base = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "VLLM_CPU_OMP", "DWDP_"))}
    return {
        **base,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": str(REPO),
        "PYTHONFAULTHANDLER": "1",
        **more,
    }


def processes(session: int) -> list[str]:
    """Command lines of the live processes of a session, or process group (everything an engine started, also orphans)."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if str(session) in stat[2:4] and stat[0] != "Z":
                found.append(f"{folder.name} {(folder / 'cmdline').read_text().replace(chr(0), ' ')[:120]}")
        except OSError:
            continue
    return found


@dataclass
class Leftovers:
    """What was there before an engine started; `check` says what is there in addition.

    The engine gets a temporary folder of its own, `tmp`, through TMPDIR.
    """

    tmp: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="e2e-")))
    shm: set[str] = field(default_factory=lambda: set(os.listdir("/dev/shm")))

    def check(self, session: int, wait_s: float = 5.0) -> list[str]:
        """Processes, shared-memory names and temporary files that came and stayed, after at most `wait_s`."""
        deadline = time.monotonic() + wait_s
        while True:
            files = sorted(name for name in os.listdir(self.tmp) if not name.startswith(_CACHES))
            left = [*processes(session), *unused(set(os.listdir("/dev/shm")) - self.shm), *files]
            if not left or time.monotonic() > deadline:
                shutil.rmtree(self.tmp, ignore_errors=True)
                return left
            time.sleep(0.2)


def listen_to_ctrl_c() -> None:
    """For `preexec_fn`: a shell that runs tests in the background has its children ignore SIGINT, a terminal has not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_job(
    folder: Path,
    model: Path | str,
    steps: Sequence[str],
    env: dict[str, str] | None = None,
    limit_s: float = 420,
    **options: Any,
) -> dict[str, Any]:
    """Run `tests.e2e.job` in its own session; its JSON, with `left`: what stayed after it.

    After `limit_s` every process of it is aborted, which has Python print where it stood.
    """
    name = f"job-{time.monotonic_ns()}"
    spec, out, log = (folder / f"{name}.{kind}" for kind in ("spec", "json", "log"))
    spec.write_text(json.dumps({"model": str(model), "options": options, "steps": list(steps)}))
    before = Leftovers()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.job", str(spec), str(out)],
            cwd=REPO,
            env=environment(TMPDIR=str(before.tmp), **(env or {})),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            time.sleep(1)
            os.killpg(process.pid, signal.SIGKILL)
            code = -9
    text = log.read_text()
    assert code == 0, f"job ended with {code}:\n{text[-6000:]}"
    return {**json.loads(out.read_text()), "left": before.check(process.pid), "log": text}


def start_example(name: str, folder: Path, *words: str) -> tuple[subprocess.Popen[bytes], Path, Leftovers]:
    """One of examples/ in a session of its own, its output, and what was there before."""
    before, log = Leftovers(), folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, f"examples/{name}.py", *words],
            cwd=REPO,
            env=environment(TMPDIR=str(before.tmp)),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=listen_to_ctrl_c,
        )
    return process, log, before


def side_by_side(*jobs: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What jobs return, run at the same time: most of an engine's start is one thread that imports vLLM. On GPUs one after
    the other, since vLLM refuses to start where free memory changes meanwhile."""
    with ThreadPoolExecutor(1 if gpus() else len(jobs)) as pool:
        return [job.result() for job in [pool.submit(job) for job in jobs]]


@functools.cache
def gpus() -> int:
    """GPUs that engines compute on here, told without using one; 0 where vLLM is built for CPU or finds no device."""
    from vllm.platforms import current_platform

    return 0 if current_platform.is_cpu() or current_platform.is_unspecified() else int(current_platform.device_count())


def default_view() -> str:
    """The view that `auto` takes where it can."""
    return "split" if gpus() else "inplace"


def engine_options() -> dict[str, Any]:
    """LLM options of every engine on GPUs, plain vLLM's too; none on CPU. DWDP_ATTENTION_BACKEND is passed on."""
    if not gpus():
        return {}
    # The expert kernels that dwdp takes: others round otherwise.
    options: dict[str, Any] = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "moe_backend": "triton"}
    if backend := os.environ.get("DWDP_ATTENTION_BACKEND"):
        options["attention_backend"] = backend
    return options


def dwdp_settings(ranks: int, **config: Any) -> dict[str, Any]:
    """`config` for ranks on as many GPUs as there are: several share one where there are fewer."""
    if not gpus():
        return config
    # Of models this small, memory would have a rank hold all experts but one.
    return {"ranks_per_device": -(-ranks // gpus()), "experts_per_rank": "partition", **config}


def dwdp(ranks: int = 2, **config: Any) -> dict[str, Any]:
    """LLM options for a dwdp launch."""
    return {
        **engine_options(),
        "distributed_executor_backend": "dwdp",
        "data_parallel_size": ranks,
        "additional_config": {"dwdp": dwdp_settings(ranks, **{"timeout_s": 120, **config})},
    }


def as_one_rank(ranks: int) -> dict[str, Any]:
    """What `run_job` needs for a plain vLLM that computes as one of `ranks` does.

    On CPU that is on the cores which the first of them gets: the same number of threads; and in the job's own process, since
    of another one most would be the import of vLLM. On a GPU with the same kernels.
    """
    if gpus():
        return engine_options()
    cores = ",".join(map(str, rank_cores(ranks)[0]))
    return {"env": {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}}


def rank_cores(ranks: int) -> list[list[int]]:
    """The cores of each rank."""
    return split_cores(physical_cores(), ranks)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
