"""`python -m vllm_dwdp.kernels.bench`: the comparison of compare.py."""

import sys

from .compare import main

if __name__ == "__main__":
    sys.exit(main())
