"""CUDA graphs with prefetching: copies inside of graphs of whole forwards, acquire and release between piecewise ones.

    whole forward   align | replay: experts, copies and their waits are all in the graph, which ends when the copies do
    piecewise       graph | acquire, on the host | graph with the experts | release, on the host | graph | attention | ...

Code that is compiled in more pieces is fused, and rounds, otherwise: piecewise graphs give plain vLLM's weights, but not
always its tokens. So where the user names no mode, whole decode steps are graphs, and all code is compiled in the pieces of
plain vLLM. Piecewise graphs are made where they are asked for, or where vLLM has nothing else (-O1, some KV connectors).

vLLM calls its offloader before it captures or replays a graph and last of all in a capture, so that weights can be copied
meanwhile (model_executor/offloader/base.py): DWDP needs the same, and no launch with DWDP has another offloader. Which graph
it is vLLM does not say; replays are counted by the graph itself (patches/cuda_graph.py).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.offloader.base import BaseOffloader, NoopOffloader, get_offloader, set_offloader

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.gates import OPS
from vllm_dwdp.patches import cuda_graph
from vllm_dwdp.prefetch.prefetcher import Prefetcher
from vllm_dwdp.prefetch.replays import ReplayCounts

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.dwdp")


def fit_graphs(vllm_config: VllmConfig, chosen: bool = True) -> None:
    """Have vLLM split its piecewise graphs at acquire and release; raises DwdpError where they cannot be split there.

    chosen: whether the user named a mode of graphs; else vLLM's default becomes whole decode steps.
    """
    compilation = vllm_config.compilation_config
    if not chosen and compilation.cudagraph_mode in (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL):
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        logger.info(
            "dwdp: CUDA graphs of whole decode steps (FULL_DECODE_ONLY); -cc.cudagraph_mode FULL_AND_PIECEWISE adds "
            "piecewise ones, under which compiled code may round otherwise than plain vLLM's"
        )
    if compilation.mode == CompilationMode.STOCK_TORCH_COMPILE:
        raise DwdpError(
            "compilation mode STOCK_TORCH_COMPILE is not supported by dwdp: use -cc.mode 3 (the default) or 0"
        )
    mode = compilation.cudagraph_mode or CUDAGraphMode.NONE
    if is_breakable_cudagraph_enabled() and mode.has_piecewise_cudagraphs():
        compilation.cudagraph_mode = mode.without_piecewise()
        logger.info(
            "dwdp: CUDA graphs are %s instead of %s: breakable graphs cannot be split at its copies; "
            "VLLM_USE_BREAKABLE_CUDAGRAPH=0 takes compiled ones",
            compilation.cudagraph_mode.name,
            mode.name,
        )
    if not splits(compilation):
        return
    if compilation.use_inductor_graph_partition:
        raise DwdpError("use_inductor_graph_partition cannot be split at dwdp's copies: leave it out")
    if not compilation.splitting_ops:
        raise DwdpError(
            "splitting_ops is empty, so that piecewise CUDA graphs would hold dwdp's copies: leave it out, or add "
            "-cc.cudagraph_mode FULL_DECODE_ONLY"
        )
    compilation.splitting_ops = [*compilation.splitting_ops, *OPS]


def splits(compilation: CompilationConfig) -> bool:
    """Whether compiled code is cut at acquire and release, so that piecewise graphs hold neither.

    Also for FULL, which vLLM turns into FULL_AND_PIECEWISE later where a backend of attention cannot do without.
    """
    mode = compilation.cudagraph_mode or CUDAGraphMode.NONE
    piecewise = mode.has_piecewise_cudagraphs() or mode == CUDAGraphMode.FULL
    return piecewise and compilation.mode == CompilationMode.VLLM_COMPILE


class CopiesInGraphs(BaseOffloader):
    """Tells the prefetcher of graphs of whole forwards.

    cut: whether compiled code is cut at acquire and release. give_counts: to the graph that is being captured.
    """

    def __init__(self, prefetcher: Prefetcher, cut: bool, give_counts: Callable[[ReplayCounts], None]) -> None:
        self._prefetcher, self._cut, self._give_counts = prefetcher, cut, give_counts

    def wrap_modules(self, modules_generator: Generator[nn.Module, None, None], prefix: str = "") -> list[nn.Module]:
        """See BaseOffloader: nothing is offloaded."""
        return list(modules_generator)

    def sync_prev_onload(self) -> None:
        """See BaseOffloader: before a capture and before a replay. Raises DwdpError before a capture that cannot end."""
        if _of_whole_forward():
            self._prefetcher.align()
        elif not self._cut and get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            raise DwdpError(
                "vLLM fell back to piecewise CUDA graphs, since its attention backend cannot be in whole ones, and they "
                "would hold dwdp's copies: choose -cc.cudagraph_mode NONE"
            )

    def join_after_forward(self) -> None:
        """See BaseOffloader: last of all in a capture."""
        if _of_whole_forward():
            self._give_counts(self._prefetcher.end_capture())


def graphs_chosen(args: EngineArgs) -> bool:
    """Whether the user named a mode of CUDA graphs; the config that is made of `args` has vLLM's default filled in."""
    return args.compilation_config.cudagraph_mode is not None


def refuse_piecewise(compilation: CompilationConfig) -> None:
    """Where code is not cut, have vLLM fall back to no graphs, not to piecewise ones, for an attention backend that cannot
    be in whole ones (`resolve_cudagraph_mode_and_sizes`, which asks this alone). On this worker's config."""
    if not splits(compilation):
        object.__setattr__(compilation, "splitting_ops_contain_attention", lambda: False)


def follow_graphs(prefetcher: Prefetcher, cut: bool) -> None:
    """Have vLLM tell `prefetcher` of its graphs; raises DwdpError where something else is told of them."""
    if not isinstance(get_offloader(), NoopOffloader):
        raise DwdpError(f"{type(get_offloader()).__name__} moves weights that peers read: turn offloading off")
    set_offloader(CopiesInGraphs(prefetcher, cut, cuda_graph.install(prefetcher.count_replay)))


def _of_whole_forward() -> bool:
    """Model runner V1 asks inside of a forward context of mode FULL, V2 outside of any; piecewise graphs have one."""
    return not is_forward_context_available() or get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL
