"""A worker extension of the soak's server: what a rank holds on its device, and digests of all experts as it sees them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.e2e.digests import Digests


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
