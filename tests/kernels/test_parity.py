"""The same bits as vLLM's own kernel, whose source is taken from the installed vLLM and interpreted beside ours.

Only dtypes that the interpreter multiplies rightly; on a GPU the bench compares all of them.
"""

import ast
import importlib.util
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl

from tests.kernels.layers import Layer
from vllm_dwdp.kernels.arguments import Assignment
from vllm_dwdp.kernels.split_gemm import split_gemm
from vllm_dwdp.kernels.tiles import Tiles
from vllm_dwdp.kernels.torch_ops import assign

SOURCE = "vllm/model_executor/layers/fused_moe/fused_moe.py"
WANTED = ("write_zeros_to_output", "fused_moe_kernel")


def _file() -> Path | None:
    for name in {found.name for found in distributions() if found.name.startswith("vllm")}:
        path = Path(str(distribution(name).locate_file(SOURCE)))
        if path.exists():
            return path
    return None


@pytest.fixture(scope="module")
def vllm_kernel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`fused_moe_kernel`, without the rest of vLLM, which would not let Triton be used on a CPU."""
    source = _file()
    if source is None:
        pytest.skip("vLLM is not installed")
    text = source.read_text()
    parts = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name in WANTED]
    lines = text.splitlines()
    body = ["\n".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno]) for node in parts]
    path = tmp_path_factory.mktemp("vllm") / "taken.py"
    path.write_text("import triton\nimport triton.language as tl\n\n\n" + "\n\n\n".join(body) + "\n")
    spec = importlib.util.spec_from_file_location("taken", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fused_moe_kernel


def _by_vllm(kernel: Any, layer: Layer, blocks: Assignment, tiles: Tiles, weigh: bool) -> torch.Tensor:
    dense, bias, routes = layer.dense[0].contiguous(), layer.biases[0], layer.tokens * layer.top_k
    out = torch.zeros(layer.tokens, layer.top_k, dense.shape[1], dtype=layer.dtype)
    em = routes * tiles.block_m if blocks.routes is None else blocks.routes.shape[0]
    grid = (-(-em // tiles.block_m) * -(-dense.shape[1] // tiles.block_n),)
    kernel[grid](
        layer.x, dense, out, bias, None, None, layer.router, blocks.routes, blocks.experts, blocks.padded,
        dense.shape[1], dense.shape[2], em, routes,
        layer.x.stride(0), 1, dense.stride(0), 1, dense.stride(1), out.stride(1), 1,
        0, 0, 0, 0, 0, 0 if bias is None else bias.stride(0), 1, 0, 0, blocks.routes is None,
        tiles.block_m, tiles.block_n, tiles.block_k, tiles.group_m, 1, weigh, layer.top_k,
        {torch.float16: tl.float16, torch.float32: tl.float32}[layer.dtype],
        False, False, False, False, bias is not None, False,
    )  # fmt: skip
    return out.view(routes, -1)


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float16, 37), (torch.float32, 37), (torch.float16, 1)])
def test_same_bits_as_vllm(vllm_kernel: Any, dtype: torch.dtype, tokens: int, bias: bool, weigh: bool) -> None:
    """With sorted routes, and (one token of 8 experts) with a block per route."""
    layer = Layer(experts=8, hidden=72, width=20, tokens=tokens, top_k=2, dtype=dtype, bias=bias)
    tiles = Tiles(16, 32, 32, group_m=3)
    blocks = assign(layer.ids, 16, 8)
    assert (blocks.routes is None) == (tokens == 1)
    expected = _by_vllm(vllm_kernel, layer, blocks, tiles, weigh)
    out = torch.zeros_like(expected)
    router = layer.router if weigh else None
    split_gemm(layer.x, layer.tables[0], out, blocks, tiles, top_k=2, router_weights=router)
    assert torch.equal(out, expected)
    assert out.abs().max() > 0.1
