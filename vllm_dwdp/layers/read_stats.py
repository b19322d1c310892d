"""How much of the checkpoint this worker asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class ReadStats:
    """Bytes asked of the checkpoint by this process: `expert_bytes` of routed experts, `other_bytes` of everything
    else, and the largest single tensor or slice."""

    expert_bytes: int = 0
    other_bytes: int = 0
    largest: int = 0

    def add(self, tensor: torch.Tensor, expert: bool) -> None:
        """Count one tensor or slice."""
        if expert:
            self.expert_bytes += tensor.nbytes
        else:
            self.other_bytes += tensor.nbytes
        self.largest = max(self.largest, tensor.nbytes)


#: One worker process loads one model.
READ = ReadStats()
