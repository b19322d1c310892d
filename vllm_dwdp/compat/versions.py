"""Releases of vLLM whose engines were run with this plugin; docs/versions.md says what it takes to add one."""

from __future__ import annotations

from typing import Any, Final

TESTED: Final = ("0.31.0", "0.32.0")
#: Of these, what was run on CPU alone.
NOT_ON_GPUS: Final = ("0.31.0",)


def vllm_version() -> str:
    """Version of the installed vLLM without a local suffix such as `+cpu`."""
    from vllm.version import __version__

    return str(__version__).split("+", 1)[0]


def why_not_tested() -> str | None:
    """Why the installed vLLM is refused, in one line; None where it was tested."""
    version = vllm_version()
    if version in TESTED:
        return None
    return f"vLLM {version} is installed, this vllm-dwdp was made for vLLM {' and '.join(TESTED)}"


def used_files(files: list[str], source: Any) -> list[str]:
    """Of a checkpoint's files, those with a weight that the model wants; all where vLLM has no such filter (0.31)."""
    if getattr(source, "is_unused_weight", None) is None:
        return files
    from vllm.model_executor.model_loader.weight_utils import filter_safetensors_files_by_weight_name

    return list(filter_safetensors_files_by_weight_name(files, source.is_unused_weight))
