"""What a checkpoint is made from: sizes, family, seed. The same spec gives the same bytes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

from vllm_dwdp.errors import DwdpError

from .quantised import FORMS

# Goes up when the same spec gives other bytes than before, so that kept checkpoints are written anew.
FORMAT = 3
VOCAB_SIZE = 512
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
# vLLM's CPU expert kernel works on blocks of 32.
SIZE_STEP = 32


class Family(NamedTuple):
    """How a family names its experts on disk."""

    # What precedes ".experts." within a layer, in checkpoints of the hub; empty for a family without experts.
    moe_prefix: str
    # Names of the gate, up and down projections of one expert; None where the hub has only fused tensors.
    per_expert: tuple[str, str, str] | None
    # Names of all experts' gate+up and down projections in one tensor each, relative to `moe_prefix`; None where vLLM
    # loads no such tensors.
    fused: tuple[str, str] | None


_PARTS = ("gate_proj", "up_proj", "down_proj")
_QWEN = Family("mlp", _PARTS, ("experts.gate_up_proj", "experts.down_proj"))
FAMILIES: dict[str, Family] = {
    "qwen3_moe": _QWEN,
    "qwen2_moe": _QWEN,
    "olmoe": _QWEN,
    "deepseek_v3": Family("mlp", _PARTS, None),
    # The hub has no fused Mixtral; these are the names under which vLLM would look for it.
    "mixtral": Family("block_sparse_moe", ("w1", "w3", "w2"), ("experts.w13", "experts.w2")),
    "granitemoe": Family("block_sparse_moe", None, ("input_linear.weight", "output_linear.weight")),
    "gpt_oss": Family("mlp", None, ("experts.gate_up_proj", "experts.down_proj")),
    "qwen3": Family("", None, None),
}

#: Rows and columns that share a scale.
FP8_BLOCK = 128


@dataclass(frozen=True)
class CheckpointSpec:
    """Sizes of a checkpoint; the defaults make 1.5 million parameters whose expert tensors fill whole pages."""

    family: str = "qwen3_moe"
    num_experts: int = 8
    num_layers: int = 4
    # DeepSeek-V3 only: layers at the start that have no experts. The others all have.
    dense_layers: int = 1
    hidden: int = 128
    intermediate: int = 128  # of one routed expert
    top_k: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    max_position: int = 1024
    dtype: str = "bfloat16"
    seed: int = 0
    # All experts of a layer in one tensor, instead of the per-expert tensors of the hub. Some families know only this.
    fused: bool = False
    # Linear layers and experts in FP8 (e4m3) with a scale per block of 128 x 128, as DeepSeek-V3 is published.
    fp8: bool = False
    # Experts, and nothing else, in one of quantised.FORMS; empty for the model's type.
    experts: str = ""
    # Split the file when it exceeds this; None keeps vLLM's usual one file per few GB.
    shard_mib: float | None = None
    # Rows of each router's `weights.hot_experts` are 1 + this times as large, so that these experts are hit most.
    router_skew: float = 0.0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise DwdpError(f"unknown family {self.family!r}: choose one of {', '.join(FAMILIES)}")
        if self.dtype not in ITEM_SIZES:
            raise DwdpError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(ITEM_SIZES)}")
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position"):
            if (count := getattr(self, name)) < 1:
                raise DwdpError(f"{name} is {count}: choose 1 or more")
        if self.shard_mib is not None and not 0 < self.shard_mib < math.inf:
            raise DwdpError(f"shard_mib is {self.shard_mib}: choose a size above 0, or leave it out for one file")
        if self.fused and FAMILIES[self.family].fused is None:
            raise DwdpError(f"vLLM loads no fused experts of family {self.family}: leave out fused")
        if self.fp8 and (self.is_fused or self.hidden % FP8_BLOCK or self.intermediate % FP8_BLOCK):
            raise DwdpError(
                f"fp8 with hidden {self.hidden}, intermediate {self.intermediate}, fused {self.is_fused}: needs experts "
                f"one by one, in sizes that are multiples of {FP8_BLOCK}"
            )
        if self.experts:
            self._check_form()
        for name in ("hidden", "intermediate"):
            size = getattr(self, name)
            if size <= 0 or size % SIZE_STEP:
                raise DwdpError(f"{name} is {size}, but vLLM's CPU expert kernel needs a multiple of {SIZE_STEP}")
        if not 1 <= self.top_k <= self.num_experts:
            raise DwdpError(
                f"top_k is {self.top_k}, but there are {self.num_experts} experts: choose 1 or more of them"
            )
        if self.num_heads % self.num_kv_heads:
            raise DwdpError(f"{self.num_heads} heads do not divide among {self.num_kv_heads} key/value heads")
        if not 0 <= self.router_skew < math.inf:
            raise DwdpError(f"router_skew is {self.router_skew}: choose a number from 0 on, such as 3")
        if self.family == "deepseek_v3" and not 1 <= self.dense_layers < self.num_layers:
            raise DwdpError(
                f"dense_layers is {self.dense_layers}: leave 1 to {self.num_layers - 1} of the layers dense"
            )

    def _check_form(self) -> None:
        form = FORMS.get(self.experts)
        if form is None:
            raise DwdpError(f"unknown form of experts {self.experts!r}: choose one of {', '.join(FORMS)}")
        if not self.is_moe:
            raise DwdpError(f"experts as {self.experts} in family {self.family}, which has none: choose another family")
        stored = self.family == "gpt_oss" if form.fused else not self.is_fused
        if self.fp8 or not stored or self.hidden % form.step or self.intermediate % form.step:
            needs = "family gpt_oss" if form.fused else "experts one by one"
            raise DwdpError(
                f"experts as {self.experts} in family {self.family} with hidden {self.hidden}, intermediate "
                f"{self.intermediate}, fused {self.is_fused}, fp8 {self.fp8}: needs {needs}, no fp8, and sizes that are "
                f"multiples of {form.step}"
            )

    @property
    def is_moe(self) -> bool:
        return bool(FAMILIES[self.family].moe_prefix)

    @property
    def is_fused(self) -> bool:
        """Whether the experts on disk are fused, by choice or because the family knows nothing else."""
        return self.is_moe and (self.fused or FAMILIES[self.family].per_expert is None)

    @property
    def first_moe_layer(self) -> int:
        return self.dense_layers if self.family == "deepseek_v3" else 0

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.first_moe_layer if self.is_moe else 0

    @property
    def expert_bytes(self) -> tuple[int, int]:
        """Bytes of one expert's gate+up and down projections, without scales."""
        bits = FORMS[self.experts].bits if self.experts else 8 if self.fp8 else 8 * ITEM_SIZES[self.dtype]
        down = self.intermediate * self.hidden * bits // 8
        return 2 * down, down

    def as_json(self) -> dict[str, object]:
        return {"format": FORMAT, **asdict(self)}
