"""CUDA graphs hold forwards that read experts where they are, and no others: a graph of copies would replay stale slots.

    at most direct_tokens   vLLM's graphs, of whole decode steps and piecewise, as without dwdp
    more                    eager or compiled as in plain vLLM, launched one by one, between acquire and release

What is compiled is cut where plain vLLM cuts it: the layer is behind vLLM's own opaque op.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import CompilationConfig

    from vllm_dwdp.config import DwdpConfig

logger = init_logger("vllm.dwdp")


def fit_graphs(compilation: CompilationConfig, config: DwdpConfig) -> None:
    """Have vLLM capture nothing where no forward will read directly, as far as settings tell; says so in one line."""
    if config.direct_tokens == 0:
        _without_graphs(compilation, "dwdp.direct_tokens is 0")
    elif config.transport == "cuda_pinned":
        _without_graphs(compilation, 'dwdp.transport is "cuda_pinned", over which nothing is read directly')
    elif config.weight_view == "contiguous":
        _without_graphs(compilation, 'dwdp.weight_view is "contiguous", which pulls in every forward')


def limit_graphs(compilation: CompilationConfig, direct_tokens: int, rank: int, query_tokens: int = 1) -> None:
    """Leave out the sizes of graphs beyond `direct_tokens`; on this worker's config, before anything is captured.

    query_tokens: of one request in a decode step; with speculation more than one, and vLLM needs a size for them.
    """
    if compilation.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return
    sizes = [size for size in compilation.cudagraph_capture_sizes or () if size <= direct_tokens]
    if not sizes or max(sizes) < query_tokens:
        _without_graphs(compilation, f"rank {rank} reads experts directly up to {direct_tokens} tokens")
        return
    if len(sizes) < len(compilation.cudagraph_capture_sizes):
        logger.info(
            "dwdp rank %d: CUDA graphs up to %d tokens, not %d: larger forwards pull experts",
            rank,
            max(sizes),
            compilation.max_cudagraph_capture_size,
        )
    compilation.cudagraph_capture_sizes = sizes
    compilation.max_cudagraph_capture_size = max(sizes)


def captured_tokens(compilation: CompilationConfig) -> int:
    """The most tokens at which any step, mixed ones too, is in a CUDA graph; 0 where there is none."""
    mode = compilation.cudagraph_mode
    if mode is None or mode.mixed_mode() == CUDAGraphMode.NONE:
        return 0
    return compilation.max_cudagraph_capture_size or 0


def _without_graphs(compilation: CompilationConfig, why: str) -> None:
    if compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE):
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        logger.info("dwdp: without CUDA graphs (%s): they would hold copies, and a replay would read stale slots", why)
