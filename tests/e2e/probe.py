"""Test methods inside a real worker, added with vLLM's own `worker_extension_cls`; importing it starts the RSS sampler."""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.e2e.digests import Digests

_PERIOD_S = 0.004


def resident() -> int:
    """Bytes of private and shared memory of this process, without pages of files (the mapped checkpoint)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024


class _Sampler(threading.Thread):
    """Highest `resident()` seen; an allocation shorter than the period may be missed."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = resident()
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, resident())
            time.sleep(_PERIOD_S)


_SAMPLER = _Sampler()
_LOAD: dict[str, int] = {}


def _note_load() -> None:
    """Note what is resident when a dwdp worker begins to build its model, and the highest until all is in slabs."""
    from vllm_dwdp.layers import sharing
    from vllm_dwdp.layers.build import ModelBuild

    open_build, map_peers = ModelBuild.open, sharing.map_peers

    def opened(build: ModelBuild) -> ModelBuild:
        _SAMPLER.peak = _LOAD["before"] = resident()
        return open_build(build)

    def mapped(*args: Any) -> None:
        _LOAD["peak"] = max(_SAMPLER.peak, resident())
        map_peers(*args)

    ModelBuild.open, sharing.map_peers = opened, mapped  # type: ignore[method-assign, assignment]


if "vllm_dwdp.engine.worker" in sys.modules:
    _note_load()


class Probe(Digests):
    """Mixed into the worker; every method is called with `LLM.collective_rpc`."""

    def probe_memory(self) -> dict[str, int]:
        """Resident bytes before loading and at the highest while loading; expert and replicated bytes by storage."""
        storages: dict[int, int] = {}
        for _, layer in self._expert_layers():
            for parameter in layer.parameters():
                storage = parameter.data.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        replicated = sum(
            parameter.nbytes
            for name, parameter in self.model_runner.model.named_parameters()
            if ".routed_experts." not in name
        )
        return {
            **{f"load_{name}": nbytes for name, nbytes in _LOAD.items()},
            "now": resident(),
            "storages": sum(storages.values()),
            "replicated": replicated,
        }

    def probe_maps(self) -> dict[str, int]:
        """Bytes of dwdp's memory files mapped here, by protection: a peer's pages must not be writable."""
        sizes: dict[str, int] = {}
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "memfd:dwdp-" in line:
                span, protection = line.split()[:2]
                low, high = (int(part, 16) for part in span.split("-"))
                sizes[protection] = sizes.get(protection, 0) + high - low
        return sizes

    def probe_swap_experts(self) -> bool:
        """Exchange two experts of the first layer in this rank's slab."""
        sharing = self.dwdp_sharing  # type: ignore[attr-defined]
        layer = sharing.layers[0]
        for tensor in layer.fetched:
            offset = layer.layout.slabs[sharing.build.rank].begin(tensor.name)
            rows = tensor.view(layer.slab.tensor(), offset, 2)
            rows.copy_(rows.flip(0).clone())
        return True

    def probe_ways(self) -> dict[str, str]:
        """See ways.py."""
        from tests.e2e.ways import tried

        return tried(self)

    def probe_dense(self) -> str:
        """A digest of every weight that is no expert's."""
        import torch

        total = hashlib.sha1()
        for name, parameter in self.model_runner.model.named_parameters():
            if ".routed_experts." not in name:
                total.update(parameter.data.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
        return total.hexdigest()

    def probe_zero_pulls(self) -> bool:
        """From here on pulls leave zeros in the slots instead of experts."""
        sharing = self.dwdp_sharing  # type: ignore[attr-defined]
        engine = sharing.prefetcher._engine
        slots = [(slot.address, slot.nbytes) for slot in sharing.slots]

        def copy(program: object) -> None:
            for address, nbytes in slots:
                ctypes.memset(address, 0, nbytes)

        engine._copy = copy
        return True

    def probe_watch_routing(self) -> bool:
        """From here on count which experts the layers are asked for, on the host, by eager code."""
        import torch

        self.routed: dict[str, list[int]] = {}

        def watch(layer: Any, counts: list[int]) -> None:
            forward = layer.forward_modular

            def watched(*args: Any, **kwargs: Any) -> Any:
                for expert, n in enumerate(torch.bincount(kwargs["topk_ids"].flatten().long()).tolist()):
                    counts[expert] += n
                return forward(*args, **kwargs)

            layer.forward_modular = watched

        for _, layer in self._expert_layers():
            watch(layer, self.routed.setdefault(layer.layer_name, [0] * layer.global_num_experts))
        return True

    def probe_routed(self) -> dict[str, list[int]]:
        """Layer -> [expert] -> how often it was asked for since `probe_watch_routing`."""
        return self.routed

    def probe_trace(self) -> list[tuple[int, str, int, int]]:
        """The event trace of this rank (`dwdp.trace`), in order of time."""
        return sorted((int(t), str(k), int(layer), int(s)) for t, k, layer, s in self.dwdp_sharing.trace)  # type: ignore[attr-defined]

    def probe_affinity(self) -> dict[str, Any]:
        """Where this worker computes."""
        import os

        import torch

        names = ("OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
        torch.ones(1 << 16).sum()  # OpenMP binds this thread at its first parallel region, if not before
        return {
            "threads": torch.get_num_threads(),
            "bind": next((os.environ[name] for name in names if name in os.environ), None),
            "cores": sorted(os.sched_getaffinity(0)),
        }
