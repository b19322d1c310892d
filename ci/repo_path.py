"""Imported for its effect: makes vllm_dwdp importable from a checkout that is not installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
