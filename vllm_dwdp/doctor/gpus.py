"""GPUs and the links between them: what ranks may read of each other, and how fast (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vllm_dwdp.doctor.line import Line, failure, ok, warning
from vllm_dwdp.doctor.readings import Offer, Read, Torch, Unread
from vllm_dwdp.doctor.smi import Gpu, Smi
from vllm_dwdp.predict.hardware_file import load_hardware
from vllm_dwdp.predict.memory_plan import UTILISATION
from vllm_dwdp.predict.startup import hardware_of

#: Bytes/s one way: above what 16 lanes of PCIe 5 give, below any NVLink between data-centre GPUs.
PCIE: Final = 65e9
#: Of the rate that the hardware file foresees, below which something is wrong with the link.
FAR_BELOW: Final = 0.6
#: BF16 on tensor cores.
_BF16: Final = (8, 0)
CONTAINER: Final = "in containers run all ranks in one, or give each --ipc=host, --pid=host and all GPUs"


def visible(smi: Smi | None, torch: Torch | Unread) -> list[Gpu]:
    """The GPUs that ranks would use: those that torch sees, or all that nvidia-smi lists where that is not known."""
    listed = list(smi.gpus) if smi is not None else []
    if isinstance(torch, Unread) or not torch.gpus:
        return listed
    # A MIG instance has a UUID of its own.
    return [gpu for gpu in listed if gpu.uuid in torch.gpus] or listed


def number(gpus: Sequence[Gpu]) -> list[Line]:
    """Nothing where there is none: the driver's line says so."""
    if len(gpus) == 1:
        remedy = "give it two or more; several ranks on one GPU (dwdp.ranks_per_device) are for development"
        return [warning("GPUs", "1, and ranks share experts between GPUs", remedy)]
    return [ok("GPUs", f"{len(gpus)}")] if gpus else []


def one(gpu: Gpu) -> Line:
    """Memory, compute capability and MIG of one."""
    name = f"GPU {gpu.index}"
    shape = f"{gpu.name}, compute capability {'.'.join(map(str, gpu.capability))}" if gpu.capability else gpu.name
    if gpu.mig:
        remedy = f"nvidia-smi -i {gpu.index} -mig 0: CUDA IPC does not reach from one MIG instance to another"
        return warning(name, f"{shape}, in MIG mode", remedy)
    if gpu.capability is not None and gpu.capability < _BF16:
        return warning(name, f"{shape}, which has no BF16", "use GPUs of compute capability 8.0 or more")
    if gpu.total is None or gpu.free is None:
        return warning(name, f"{shape}, memory not told", "look at nvidia-smi")
    text = f"{shape}, {gpu.free / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB free"
    if gpu.free < UTILISATION * gpu.total:
        remedy = f"end what nvidia-smi lists, or lower --gpu-memory-utilization ({UTILISATION} by default)"
        return warning(name, text, remedy)
    return ok(name, text)


def wsl(release: str, gpus: Sequence[Gpu]) -> list[Line]:
    """release: of the kernel. Nothing where it is no WSL."""
    if "microsoft" not in release.lower():
        return []
    if gpus:
        return [
            failure("WSL", "there is no CUDA IPC under WSL", "run on Linux itself; under WSL ranks run on CPU only")
        ]
    return [ok("WSL", "ranks run on the CPU")]


def peer_access(reads: Sequence[Read]) -> list[Line]:
    """Between every ordered pair; nothing for a single GPU."""
    pairs = [read for read in reads if read.reader != read.owner]
    if not pairs:
        return []
    without = [f"GPU {read.reader} of {read.owner}" for read in pairs if not read.access]
    if without:
        remedy = "choose GPUs joined by NVLink or one PCIe switch (nvidia-smi topo -p2p r shows them)"
        return [failure("peer access", f"{len(without)} of {len(pairs)} pairs have none: {', '.join(without)}", remedy)]
    return [ok("peer access", f"all {len(pairs)} ordered pairs")]


def ipc(offers: Sequence[Offer], reads: Sequence[Read]) -> Line:
    """CUDA IPC, tried between two processes."""
    refused = [f"GPU {offer.index}: {offer.refused}" for offer in offers if offer.refused]
    refused += [f"GPU {read.reader} of {read.owner}: {read.refused}" for read in reads if read.refused]
    wrong = [f"GPU {read.reader} of {read.owner}" for read in reads if not read.right]
    if refused:
        return failure("CUDA IPC", f"refused: {refused[0]}", CONTAINER)
    if wrong:
        return failure("CUDA IPC", f"wrong bytes: {', '.join(wrong)}", "look at dmesg for the driver's errors")
    if not any(read.access for read in reads):
        return warning("CUDA IPC", "not tried: no GPU may read another one's memory", "see peer access")
    return ok("CUDA IPC", "tried between processes, bytes compared")


def vmm(offers: Sequence[Offer]) -> list[Line]:
    """Memory as file descriptors, for transport vmm; fabric handles are told, nothing uses them."""
    told = {offer.vmm for offer in offers}
    if not offers:
        return []
    if None in told:
        return [ok("CUDA VMM", "not looked at: cuda.bindings is not installed; only transport vmm needs it")]
    if told != {True}:
        return [ok("CUDA VMM", "not allowed; only transport vmm needs it")]
    fabric = "allowed" if all(offer.fabric for offer in offers) else "not allowed"
    return [ok("CUDA VMM", f"allowed, by file descriptors; fabric handles: {fabric}")]


def links(offers: Sequence[Offer], reads: Sequence[Read]) -> list[Line]:
    """Measured rates, a line for every reader."""
    lines = []
    for offer in offers:
        mine = [read for read in reads if read.reader == offer.index != read.owner and read.rate]
        if not mine:
            continue
        rates = ", ".join(f"{read.rate / 1e9:.0f} from GPU {read.owner}" for read in mine)
        name, text, slowest = f"links of GPU {offer.index}", f"GB/s: {rates}", min(read.rate for read in mine)
        foreseen = _foreseen(offer.name)
        if slowest < PCIE:
            remedy = (
                "expect pulls to take longer than compute unless prompts are long: hold more experts "
                "(dwdp.experts_per_rank), or use GPUs joined by NVLink (nvidia-smi topo -m)"
            )
            lines.append(warning(name, f"{text}: no more than PCIe gives", remedy))
        elif slowest < FAR_BELOW * foreseen:
            remedy = "see that nothing else uses the GPUs, and nvidia-smi nvlink --status"
            lines.append(warning(name, f"{text}, where {foreseen / 1e9:.0f} are usual", remedy))
        else:
            lines.append(ok(name, text))
    return lines


def _foreseen(device: str) -> float:
    """Bytes/s from one peer; 0 for GPUs without a hardware file."""
    hardware = hardware_of(device)
    return 0.0 if hardware is None else load_hardware(hardware).pull_rate(2)
