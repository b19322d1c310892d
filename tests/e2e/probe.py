"""Test methods inside a real worker, added with vLLM's own `worker_extension_cls`; importing it starts the RSS sampler."""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
import time
from pathlib import Path
from typing import Any

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


class Probe:
    """Mixed into the worker; every method is called with `LLM.collective_rpc`."""

    model_runner: Any

    def _expert_layers(self) -> list[tuple[str, Any]]:
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        return [(n, m) for n, m in self.model_runner.model.named_modules() if isinstance(m, RoutedExperts)]

    def probe_digests(self) -> dict[str, list[str]]:
        """`layer.tensor` -> digest of every expert's row, as its kernels see it (behind acquire with dwdp)."""
        import torch

        digests: dict[str, list[str]] = {}
        for name, layer in self._expert_layers():
            gate = getattr(layer, "dwdp_gate", None)
            tokens = 1 + self._direct_tokens()
            if gate is not None:
                gate.acquire(layer.dwdp_layer, tokens)
            for tensor, parameter in layer.named_parameters():
                if parameter.ndim > 1:
                    rows = self._rows_by_address(layer, tensor)
                    if rows is None:
                        rows = parameter.data.contiguous().view(torch.uint8).flatten(1).cpu()
                    digests[f"{name}.{tensor}"] = [hashlib.sha1(row.numpy().tobytes()).hexdigest() for row in rows]
            if gate is not None:
                gate.release(layer.dwdp_layer, tokens)
        return digests

    def _direct_tokens(self) -> int:
        """The most tokens of a forward that reads experts where they are; 0 without dwdp, and where all or none do."""
        sharing = getattr(self, "dwdp_sharing", None)
        return 0 if sharing is None else sharing.direct_tokens or 0

    def _rows_by_address(self, layer: Any, tensor: str) -> Any:
        """uint8 [E, bytes of a row] as the split-weight kernels find them, by either table; None for tensors without."""
        tables = getattr(layer, "dwdp_tables", None)
        names = ("w13_weight", "w2_weight")
        if tables is None or tensor not in names:
            return None
        import torch

        sharing = self.dwdp_sharing  # type: ignore[attr-defined]
        slabs = sharing.layers[layer.dwdp_layer]
        found = []
        for pair, elsewhere in ((tables.pulled, sharing.slots), (tables.direct, slabs.peers.values())):
            table, rows = pair[names.index(tensor)], []
            nbytes = table.rows * table.cols * table.dtype.itemsize
            for address in table.addresses.tolist():
                [memory] = [m for m in (slabs.slab, *elsewhere) if m.address <= address < m.address + m.nbytes]
                rows.append(memory.tensor()[address - memory.address :][:nbytes].cpu())
            found.append(torch.stack(rows))
        assert torch.equal(*found), "owners hold other bytes than the slot"
        return found[0]

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
