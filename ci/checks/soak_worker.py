"""A worker extension of the soak's server: what a rank holds on its device, and digests of all experts as it sees them; and
how a server is asked for it."""

from __future__ import annotations

import hashlib
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, Final

from tests.e2e.digests import Digests

#: Words for a `vllm serve` that can be asked, which needs VLLM_SERVER_DEV_MODE=1 too.
WORDS: Final = ("--worker-extension-cls", "ci.checks.soak_worker.SoakWorker")


def ask_states(url: str, ranks: int, digests: bool = False, limit_s: float = 120) -> dict[int, dict[str, Any]]:
    """What `soak_state` says of each rank of a server; raises OSError where it does not answer."""
    with tempfile.TemporaryDirectory(prefix="soak-state-") as folder:
        body = {"method": "soak_state", "args": [folder, "yes" if digests else "no"]}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/collective_rpc", json.dumps(body).encode(), headers)
        urllib.request.urlopen(request, timeout=limit_s).close()
        return {rank: json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(ranks)}


class SoakWorker(Digests):
    """Called over HTTP (`/collective_rpc` of vLLM's development mode), which reaches all ranks and answers for the first."""

    def soak_state(self, folder: str, digests: str) -> None:
        """Write rank-N.json into `folder`: MiB in use on this rank's device, and where `digests` says yes one of experts."""
        import torch

        worker: Any = self
        state: dict[str, Any] = {}
        if worker.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(worker.device)
            state["device_mib"] = (total - free) / 2**20
        if digests == "yes":
            found = json.dumps(self.probe_digests(), sort_keys=True)
            state["digest"] = hashlib.sha1(found.encode()).hexdigest()
        path = Path(folder) / f"rank-{worker.vllm_config.parallel_config.data_parallel_index}.json"
        path.with_suffix(".tmp").write_text(json.dumps(state))
        path.with_suffix(".tmp").rename(path)
