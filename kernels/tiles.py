"""Tile configuration of a launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vllm_dwdp.errors import DwdpError

#: pointer: vLLM's own scheme, bitwise equal to it. persistent: a fixed grid that reads weights through a descriptor, with
#: the same bits; where no descriptor can be, the pointer kernel computes instead.
KernelName = Literal["pointer", "persistent"]

_VLLM_NAMES = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "GROUP_SIZE_M": "group_m",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
}


@dataclass(frozen=True)
class Tiles:
    """Rows, columns and depth of a tile, and how the compiler is to treat it.

    Attributes:
        group_m: row blocks that share a column block before the next column block is begun.
        kernel: which kernel reads the weights.
        spread: in how many runs the row blocks are cut that are computed side by side. 1 goes from expert to expert; more,
            for the pointer kernel, are made for experts that lie over a link: own and far ones are in flight together, and
            single routes of one expert become one block, so that its weights are read once.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 1
    num_warps: int = 4
    num_stages: int = 3
    kernel: KernelName = "pointer"
    spread: int = 1

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise DwdpError(f"{name} is {size}: a tile has powers of two of at least 16")
        if self.kernel not in ("pointer", "persistent"):
            raise DwdpError(f"tiles name the kernel {self.kernel!r}; there are pointer and persistent")
        if self.spread < 1 or (self.spread > 1 and self.kernel != "pointer"):
            raise DwdpError(
                f"tiles of the {self.kernel} kernel with a spread of {self.spread}: 1, or more with the pointer kernel"
            )

    @classmethod
    def from_vllm(cls, config: Mapping[str, int]) -> Tiles:
        """From a configuration in vLLM's names; SPLIT_K has no effect there, nor here."""
        unknown = config.keys() - _VLLM_NAMES.keys() - {"SPLIT_K"}
        if unknown:
            raise DwdpError(
                f"tile configuration with {', '.join(sorted(unknown))}: not known to the split-weight kernels"
            )
        return cls(**{_VLLM_NAMES[name]: size for name, size in config.items() if name != "SPLIT_K"})  # type: ignore[arg-type]

    def to_vllm(self) -> dict[str, int]:
        """In vLLM's names, as its kernels take it."""
        return {name: getattr(self, own) for name, own in _VLLM_NAMES.items()} | {"SPLIT_K": 1}

    def to_json(self) -> dict[str, Any]:
        """The fields, as tables keep them."""
        return asdict(self)
