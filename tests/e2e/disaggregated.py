"""DWDP prefill, a decoding engine and vllm-router, as examples/disaggregated.py starts them, for tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.e2e.engines import REPO, Leftovers, environment, processes

sys.path.insert(0, str(REPO / "examples"))
import disaggregated as example
from servers import Server, Servers

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None or not (example.BIN / "vllm-router").exists(),
    reason="nixl or vllm-router is missing: the extra `disaggregated`, which `make setup` brings",
)
#: Ends of engines and of KV caches that nobody fetched (30 s) included.
QUIET_LIMIT_S = 90


@dataclass
class Cluster:
    """The three of one plan, and what was there before."""

    servers: Servers
    plan: example.Plan
    before: Leftovers
    prefill: Server
    decode: Server
    router: Server

    def ask(self, prompt: str, tokens: int = 12) -> list[int]:
        """Greedy tokens, through the router."""
        return example.ask(self.router.url, prompt, tokens).tokens

    def alone(self, prompt: str, tokens: int = 12) -> list[int]:
        """Greedy tokens of the decoding engine alone."""
        return example.alone(self.decode, prompt, tokens).tokens

    def post(self, server: Server, body: dict[str, Any], rank: int | None = None) -> Any:
        """The answer to one completion, pinned to `rank` if given."""
        headers = {"Content-Type": "application/json"}
        if rank is not None:
            headers["X-data-parallel-rank"] = str(rank)
        data = json.dumps({"model": "demo", "temperature": 0, **body}).encode()
        with urlopen(Request(f"{server.url}/v1/completions", data, headers), timeout=60) as reply:
            return json.loads(reply.read())

    def prompts(self) -> list[int]:
        """Prompts that each rank of prefill has computed. Published once a second."""
        time.sleep(1.2)
        of = (f'engine="{rank}"' for rank in range(self.plan.ranks))
        return [int(example.series(self.prefill, "vllm:request_success_total", label)) for label in of]

    def transfers(self) -> int:
        """KV caches that decode has fetched."""
        time.sleep(1.2)
        return int(example.series(self.decode, "vllm:nixl_bytes_transferred_count"))

    def wait_until(self, what: str, holds: Callable[[], bool], limit_s: float = QUIET_LIMIT_S) -> None:
        """Return once `holds`; an error of HTTP is no."""
        deadline = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(OSError):
                if holds():
                    return
            assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what}"
            time.sleep(0.5)

    def wait_until_quiet(self) -> None:
        """Return once no request runs and no block of a KV cache is held on either side."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")

        def quiet() -> bool:
            return not any(example.series(server, name) for server in (self.prefill, self.decode) for name in names)

        self.wait_until("no request runs, and no KV cache is held", quiet)

    def pids(self, server: Server, name: str) -> list[int]:
        """Processes of a server whose title contains `name`."""
        return [int(line.split()[0]) for line in processes(server.process.pid) if name in line]

    def rank_pids(self, rank: int) -> list[int]:
        """A rank of prefill: its engine, and its worker where that is a process of its own."""
        [engine] = self.pids(self.prefill, f"EngineCore_DP{rank}")
        parents = {
            pid: int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            for pid in self.pids(self.prefill, "VLLM::Worker")
        }
        return [engine, *(pid for pid, parent in parents.items() if parent == engine)]

    def left(self) -> list[str]:
        """Stop everything; what stayed."""
        groups = [server.process.pid for server in self.servers.started]
        self.servers.stop()
        return [line for group in groups for line in processes(group)] + self.before.check(groups[0])


@contextlib.contextmanager
def cluster(folder: Path, plan: example.Plan) -> Iterator[Cluster]:
    """Started and stopped; raises AssertionError, with the reason, where it does not come up."""
    before = Leftovers()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(TMPDIR=str(before.tmp)).items():
            patch.setenv(name, value)
        servers = Servers(folder)
        try:
            prefill, decode = (example.start_engines(servers, plan, decode) for decode in (False, True))
            servers.wait(400)
            router = example.start_router(servers, prefill, decode)
            servers.wait(60)
            yield Cluster(servers, plan, before, prefill, decode, router)
        except SystemExit as error:
            raise AssertionError(str(error)) from None
        finally:
            servers.stop()
