"""Digests of all experts, as a worker's kernels see them: for tests and for the soak."""

from __future__ import annotations

import hashlib
from typing import Any


class Digests:
    """Mixed into the worker with vLLM's own `worker_extension_cls`."""

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
                rows = self._rows_by_address(layer, tensor)
                self._check_direct_range(layer, parameter)
                if rows is None:
                    # A single value for all experts is a row.
                    count = len(parameter) if parameter.ndim else 1
                    rows = parameter.data.contiguous().view(count, -1).view(torch.uint8).cpu()
                digests[f"{name}.{tensor}"] = [hashlib.sha1(row.numpy().tobytes()).hexdigest() for row in rows]
            if gate is not None:
                gate.release(layer.dwdp_layer, tokens)
        return digests

    def _direct_tokens(self) -> int:
        """The most tokens of a forward that reads experts where they are; 0 without dwdp, and where all or none do."""
        sharing = getattr(self, "dwdp_sharing", None)
        return 0 if sharing is None else sharing.direct_tokens or 0

    def _check_direct_range(self, layer: Any, parameter: Any) -> None:
        """In a composite view the range of direct reads has to hold the bytes that were pulled."""
        import torch

        for tensor in ranges.tensors if (ranges := getattr(layer, "dwdp_ranges", None)) else ():
            if tensor.parameter is parameter:
                assert parameter.data.data_ptr() == tensor.pulled.data_ptr()
                seen = [found.view(torch.uint8).cpu() for found in (tensor.pulled, tensor.direct)]
                assert torch.equal(*seen), "owners hold other bytes than the slot"

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
