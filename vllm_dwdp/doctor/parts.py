"""What runs in a child of the doctor: `python -m vllm_dwdp.doctor.parts PART`. Answers are lines of JSON on stdout."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, Final

from vllm_dwdp.doctor.readings import Cupy, Torch, Vllm
from vllm_dwdp.errors import DOCTOR

#: The kernel ends a child that is still there then, whatever it hangs in, and one whose doctor has ended, however that did.
LIFE_S: Final = 600
_PR_SET_PDEATHSIG: Final = 1

Say = Callable[[dict[str, Any]], None]


def torch_part(orders: Iterable[Any], say: Say) -> None:
    """Version, CUDA, and the GPUs that it sees."""
    import torch

    count = torch.cuda.device_count() if torch.version.cuda else 0
    trouble = ""
    if torch.version.cuda and not count:
        try:
            torch.cuda.init()
        except Exception as error:  # whatever it is: it says why
            trouble = one_line(error)
    gpus = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]
    say(asdict(Torch(str(torch.__version__), torch.version.cuda, gpus, trouble)))


def vllm_part(orders: Iterable[Any], say: Say) -> None:
    """Whether vLLM can be imported, and its version."""
    from vllm_dwdp.compat.versions import vllm_version, why_not_tested

    say(asdict(Vllm(vllm_version(), why_not_tested() or "")))


def cupy_part(orders: Iterable[Any], say: Say) -> None:
    """CuPy's version, and that of the CUDA runtime that it brings or finds; needs no GPU."""
    import cupy
    from cupy.cuda import runtime

    say(asdict(Cupy(str(cupy.__version__), int(runtime.runtimeGetVersion()))))


def memfd_part(orders: Iterable[Any], say: Say) -> None:
    """Reads the memory file of another process, as peers do."""
    import ctypes

    from vllm_dwdp.transport.base import Handle
    from vllm_dwdp.transport.memfd import map_handle

    for order in orders:
        mapping = map_handle(Handle.from_dict(order), "the doctor's trial")
        say({"bytes": ctypes.string_at(mapping.address, mapping.nbytes).hex()})


def gpu_part(orders: Iterable[Any], say: Say, index: int) -> None:
    """One GPU as a rank: offers memory, and reads that of others when told to."""
    from vllm_dwdp.doctor.gpu_rank import GpuRank
    from vllm_dwdp.transport.cuda_cupy import CupyDevice

    with GpuRank(CupyDevice(index)) as rank:
        say(asdict(rank.offer()))
        for order in orders:
            say({"reads": [asdict(rank.read(owner)) for owner in order]})


PARTS: Final[dict[str, Callable[..., None]]] = {
    "torch": torch_part,
    "vllm": vllm_part,
    "cupy": cupy_part,
    "memfd": memfd_part,
    "gpu": gpu_part,
}


def one_line(error: BaseException) -> str:
    """An error as one line of at most 300 characters, without the advice to ask the doctor."""
    return " ".join(str(error).split()).removesuffix(DOCTOR)[:300] or type(error).__name__


def run(part: str, orders: Iterable[Any], say: Say, *arguments: int) -> None:
    """Whatever is raised is an answer too."""
    try:
        PARTS[part](orders, say, *arguments)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == part
        say({"error": one_line(error), "absent": absent})
    except Exception as error:
        say({"error": one_line(error)})


def _orders() -> Iterator[Any]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """What libraries print goes to stderr: stdout has answers only."""
    signal.alarm(LIFE_S)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    run(sys.argv[1], _orders(), say, *map(int, sys.argv[2:]))


if __name__ == "__main__":
    main()
