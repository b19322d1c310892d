"""Which seams of vllm_dwdp/compat/seams.py a release of vLLM changed; nothing is installed or imported of it.

    python -m ci.checks.check_seams WHEEL-OR-FOLDER

A folder holds `vllm/`. Ends with 1 where anything changed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_dwdp.compat.seams import SEAMS, misfits


def main() -> int:
    """Print a line per changed seam and a last one with their number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", type=Path, help="a wheel, or a folder that holds vllm/")
    where: Path = parser.parse_args().where
    with tempfile.TemporaryDirectory() as folder:
        if where.is_file():
            with zipfile.ZipFile(where) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
            where = Path(folder)
        if not (where / "vllm").is_dir():
            parser.error(f"{where} holds no vllm/")
        changed = list(misfits(where))
    print(*changed, f"{len(changed)} of {len(SEAMS)} seams changed", sep="\n")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
