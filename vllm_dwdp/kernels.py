"""Lets `vllm_dwdp.kernels` be imported from a source tree: there the folder kernels/ lies beside this package.

An installed tree has the folder vllm_dwdp/kernels/, which Python prefers to this file.
"""

from pathlib import Path

# A module with a __path__ is a package: its submodules are looked for there.
__path__ = [str(Path(__file__).resolve().parent.parent / "kernels")]
