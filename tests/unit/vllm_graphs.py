"""What vLLM's own graph code needs to run over the simulated device: torch's graphs, streams and contexts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.compilation.cuda_graph as v1
import vllm.v1.worker.gpu.cudagraph_utils as v2
from vllm.config import CUDAGraphMode

from tests.unit.fake_cuda import FakeCuda


def use_simulated_graphs(device: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch.cuda.CUDAGraph capture and replay on `device`, and vLLM's code run without a GPU."""

    class SimulatedGraph:
        """torch.cuda.CUDAGraph, which CPU builds of torch cannot make."""

        number: int

        def capture_begin(self, *pool: Any, capture_error_mode: str = "global") -> None:
            device.begin_torch_capture()

        def capture_end(self) -> None:
            stream = device.current
            try:
                self.number = device.end_torch_capture()
            except BaseException:
                device.current = 0
                device.destroy_stream(stream)
                raise

        def replay(self) -> None:
            device.launch(self.number, 0)

    @contextlib.contextmanager
    def graph(cuda_graph: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        """As torch.cuda.graph, which ends a capture whatever happened in it."""
        cuda_graph.capture_begin(capture_error_mode="global")
        try:
            yield
        finally:
            cuda_graph.capture_end()

    @contextlib.contextmanager
    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimulatedGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    for module in (v1, v2):
        monkeypatch.setattr(module, "capture_pool", nothing)
        monkeypatch.setattr(module, "current_stream", lambda: None)
    monkeypatch.setattr(v2, "graph_capture", nothing)
    monkeypatch.setattr(v2, "is_global_first_rank", lambda: False)
    monkeypatch.setattr(v1, "validate_cudagraph_capturing_enabled", lambda: None)
    monkeypatch.setattr(v1, "weak_ref_tensors", lambda output: output)
    monkeypatch.setattr(v1.current_platform, "get_global_graph_pool", lambda: None, raising=False)


def manager(sizes: list[int], kind: type = v2.CudaGraphManager) -> Any:
    """vLLM's manager of whole graphs (model runner V2) for these token counts, largest first."""
    made: Any = object.__new__(kind)
    descs = [v2.BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size) for size in sizes]
    made.__dict__.update(
        vllm_config=None,
        device=None,
        ubatch_runner=None,
        graphs={},
        pool=None,
        use_breakable_cg=False,
        _graphs_captured=False,
        _max_full_descs_to_capture=None,
        _capture_mem_samples=None,
        _capture_descs={CUDAGraphMode.FULL: descs},
    )
    return made


def wrapper(runnable: Any) -> Any:
    """vLLM's wrapper of a model for whole graphs (model runner V1)."""
    return v1.CUDAGraphWrapper(runnable, SimpleNamespace(compilation_config=None), CUDAGraphMode.FULL)  # type: ignore[arg-type]
