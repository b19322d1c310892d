"""Tiny random mixture-of-experts checkpoints that vLLM loads like real ones, for tests, demos and benches.

    python -m examples.checkpoints OUT --family qwen3_moe --experts 8

`write_checkpoint(spec, path)` writes one, or finds it already written; `expert_tensors(path)` reads the experts back.
"""

from .read import Expert, expert_tensors
from .spec import FAMILIES, CheckpointSpec
from .weights import hot_experts
from .write import write_checkpoint

__all__ = ["FAMILIES", "CheckpointSpec", "Expert", "expert_tensors", "hot_experts", "write_checkpoint"]
