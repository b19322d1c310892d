"""Triton kernels over experts in split memory, with their benches. Installed as vllm_dwdp.kernels."""
