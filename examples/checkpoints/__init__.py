"""Tiny random mixture-of-experts checkpoints that vLLM loads like real ones, for tests, demos and benches.

    python -m vllm_dwdp.checkpoints OUT --family qwen3_moe --experts 8

`write_checkpoint(spec, path)` writes one, or finds it already written; `expert_tensors(path)` reads the experts back.
"""

from vllm_dwdp.checkpoints.read import Expert, expert_tensors
from vllm_dwdp.checkpoints.spec import FAMILIES, CheckpointSpec
from vllm_dwdp.checkpoints.weights import hot_experts
from vllm_dwdp.checkpoints.write import write_checkpoint

__all__ = ["FAMILIES", "CheckpointSpec", "Expert", "expert_tensors", "hot_experts", "write_checkpoint"]
