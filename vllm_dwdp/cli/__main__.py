"""`python -m vllm_dwdp.cli` is `vllm-dwdp`."""

import sys

from vllm_dwdp.cli import main

sys.exit(main())
