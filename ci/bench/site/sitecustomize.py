"""Put on PYTHONPATH by servers.py, so that Python imports it in every process of a server.

vLLM 0.32.0 wants two functions of NCCL that libraries before 2.29.7 lack, and only its sleep mode calls them. Where the
library that VLLM_NCCL_SO_PATH names has none, they are taken from the list that vLLM loads; nothing else is changed.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

WRAPPER = "vllm.distributed.device_communicators.pynccl_wrapper"
OPTIONAL = ("ncclCommSuspend", "ncclCommResume")


def lacking(library: str) -> tuple[str, ...]:
    """Those of OPTIONAL that the library does not have."""
    loaded = ctypes.CDLL(library)
    return tuple(name for name in OPTIONAL if not hasattr(loaded, name))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds WRAPPER as Python does, and edits its list once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != WRAPPER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_edit(module: ModuleType) -> None:
            run(module)
            missing = lacking(os.environ["VLLM_NCCL_SO_PATH"])
            library = module.NCCLLibrary
            library.exported_functions = [f for f in library.exported_functions if f.name not in missing]

        spec.loader.exec_module = run_and_edit  # type: ignore[method-assign]
        return spec


if os.environ.get("VLLM_NCCL_SO_PATH"):
    sys.meta_path.insert(0, _Finder())
