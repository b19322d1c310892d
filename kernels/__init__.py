"""Triton kernels over experts in split memory. Installed as vllm_dwdp.kernels.

    weight_table.py   where the matrices of a layer's experts are: a table of base addresses
    tiles.py          tile configuration of a launch
    tile_math.py      what one tile computes
    split_gemm.py     grouped GEMM over such a table;  persistent.py: the same on a fixed grid, with a tensor descriptor
    split_moe.py      a whole MoE layer: both GEMMs, activation, top-k reduction
    torch_ops.py, vllm_ops.py   what a layer needs beside its GEMMs: in plain torch, or vLLM's kernels
    experts.py        the class that vLLM's modular MoE layer calls
    compiled_apart.py, compile_ahead.py   which kernels a number of tokens needs; compiles them before a request does
    configs.py, tables.py   which tiles for which shape on which device
    bench/            tools, not in the wheel: compare.py (how fast, beside vLLM's), tune.py (finds tiles), accuracy.py,
                      exact.py, sanitize.py, compile_report.py (right, and compiled?)

Importing this package imports neither Triton nor vLLM.
"""
