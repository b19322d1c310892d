"""What differs between the platforms of vLLM that dwdp runs on, in one table (pure)."""

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Platform:
    """One of vLLM's platforms.

    name: as users call it. on_cpu: kernels read host memory. worker: vLLM's class and ours with it in front.
    transports, views: by preference; `choose_view` says whether layers can have a view.
    launcher: as in plain vLLM; on CPU a copy thread would share the engine's interpreter lock.
    slice_bytes: the most of one copy, None for whole ranges. On CPU a program of few copies needs the interpreter's lock
        between them (transport/shm_copy.py), one of many does not.
    quantisations: of checkpoints, by vLLM's names; which methods and kernels those lead to: layers/methods.py.
    online: vLLM's names for quantising a BF16 checkpoint while it is read, all for its Triton kernels; "fp8" is one too.
    split: those of both that split-weight kernels read, from weights in the layout of vLLM's Triton kernels.
    """

    name: str
    on_cpu: bool
    worker: tuple[str, str]
    transports: tuple[str, ...]
    views: tuple[str, ...]
    launcher: str
    slice_bytes: int | None
    quantisations: tuple[str, ...]
    online: tuple[str, ...] = ()
    split: tuple[str, ...] = ()


# fmt: off
CPU: Final = Platform(
    "CPU", True, ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm_dwdp.engine.cpu_worker.DwdpCPUWorker"),
    transports=("shm",), views=("inplace", "contiguous"), launcher="mp", slice_bytes=1 << 20,
    quantisations=())
CUDA: Final = Platform(
    "GPUs", False, ("vllm.v1.worker.gpu_worker.Worker", "vllm_dwdp.engine.gpu_worker.DwdpGPUWorker"),
    transports=("cupy_ipc", "vmm", "cuda_pinned"), views=("split", "composite", "contiguous"), launcher="uni",
    slice_bytes=None,
    quantisations=("fp8", "compressed-tensors", "auto_gptq", "auto_awq", "gpt_oss_mxfp4", "mxfp4", "modelopt_fp4"),
    online=("fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "int8_per_channel_weight_only", "online"),
    split=("fp8", "fp8_per_tensor", "fp8_per_block"))
# fmt: on


def platform_of(vllms: Any) -> Platform:
    """Ours for vLLM's `current_platform`, which is one of these."""
    return CPU if vllms.is_cpu() else CUDA
