"""Sizes of forwards that between them use every kernel that a split view will need, so that no request waits for a compiler.

Triton compiles a kernel at its first launch, which takes seconds: once for each configuration of tiles, and again for what
`compiled_apart` tells. What vLLM captures as a CUDA graph is compiled by that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_dwdp.layers.slabs import LayerSlab


def distinct_sizes(kernels_of: Iterable[Callable[[int], Hashable]], first: int, last: int) -> list[int]:
    """The fewest of `first`..`last`, ascending, at which every function has given each of its answers there."""
    sizes: dict[int, None] = {}
    for kernel_of in kernels_of:
        seen: set[Hashable] = set()
        for size in range(first, last + 1):
            kernel = kernel_of(size)
            if kernel not in seen:
                seen.add(kernel)
                sizes[size] = None
    return sorted(sizes)


def _alike(layers: Sequence[LayerSlab]) -> list[LayerSlab]:
    """One layer of each kind that a split view has."""
    kinds = {
        (
            layer.build.module.top_k,
            *(
                (table.kind, table.num_experts, table.rows, table.cols)
                for table in layer.build.module.dwdp_tables.pulled
            ),
        ): layer
        for layer in layers
        if layer.build.module.dwdp_tables is not None
    }
    return list(kinds.values())


def compile_at(layers: Sequence[LayerSlab], direct_tokens: int, sizes: Sequence[int]) -> int:
    """Compile the kernels of forwards of these sizes in threads; returns how many were not there yet.

    Saves time only: what it misses, a forward compiles.
    """
    from vllm_dwdp.kernels.compile_ahead import compile_ahead

    def at(layer: LayerSlab, tokens: int) -> None:
        module = layer.build.module
        module.dwdp_compute_direct(tokens <= direct_tokens)
        module.quant_method.moe_kernel.fused_experts.compile(tokens, module.top_k)

    return compile_ahead(partial(at, layer, tokens) for layer in _alike(layers) for tokens in sizes)


def warm_up_sizes(layers: Sequence[LayerSlab], direct_tokens: int, first: int, last: int) -> list[int]:
    """`distinct_sizes` of the split view's kernels, pulled and direct, between `first` and `last` tokens."""
    from vllm_dwdp.kernels.compiled_apart import compiled_apart

    def kernel_of(layer: LayerSlab) -> Callable[[int], Hashable]:
        module, experts = layer.build.module, layer.build.placement.num_experts

        def at(tokens: int) -> Hashable:
            module.dwdp_compute_direct(tokens <= direct_tokens)
            kernel = module.quant_method.moe_kernel.fused_experts
            travels = kernel.travels(tokens)
            both = kernel.all_tiles(tokens, module.top_k)
            return tuple(compiled_apart(tiles, tokens, module.top_k, experts, travels) for tiles in both)

        return at

    return distinct_sizes(map(kernel_of, _alike(layers)), first, last)
