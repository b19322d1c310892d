"""Triton kernels over experts in split memory, with their benches. Installed as vllm_dwdp.kernels.

    weight_table.py   where the matrices of a layer's experts are: a table of base addresses
    tiles.py          tile configuration of a launch
    tile_math.py      what one tile computes
    split_gemm.py     grouped GEMM over such a table;  persistent.py: the same on a fixed grid, with a tensor descriptor
    split_moe.py      a whole MoE layer: both GEMMs, activation, top-k reduction
    torch_ops.py, vllm_ops.py   what a layer needs beside its GEMMs: in plain torch, or vLLM's kernels
    experts.py        the class that vLLM's modular MoE layer calls
    configs.py, tables.py   which tiles for which shape on which device
    tune.py, candidates.py, precompile.py   finds and writes them
    bench.py, summary.py, rates.py, backends.py    how fast, beside what the card and vLLM's other backends reach
    accuracy.py, exact.py, sanitize.py, reference.py, compile_report.py   right, and compiled?

Importing this package imports neither Triton nor vLLM.
"""
