"""What nvidia-smi says of this machine's GPUs: asked without making a context on one."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from typing import Final

from vllm_dwdp.doctor.child import Child, ChildFailed

LIMIT_S: Final = 60.0
_FIELDS: Final = "uuid,name,memory.total,memory.free,compute_cap,mig.mode.current,driver_version"


@dataclass(frozen=True)
class Gpu:
    """index: nvidia-smi's. total, free: bytes, None where it does not tell. capability: such as (9, 0); None as before."""

    index: int
    uuid: str
    name: str
    total: int | None
    free: int | None
    capability: tuple[int, int] | None
    mig: bool

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name})"


@dataclass(frozen=True)
class Smi:
    """driver: its version. cuda: the newest CUDA that it can run; None where it is not told. trouble: why nothing was told
    though nvidia-smi is there, else ''."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: tuple[int, int] | None = None
    trouble: str = ""


def ask_smi() -> Smi | None:
    """None where there is no nvidia-smi."""
    found = shutil.which("nvidia-smi")
    if found is None:
        return None
    try:
        listed = _said(found, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
        return parse(listed, _said(found))
    except ChildFailed as error:
        return Smi(trouble=str(error))


def parse(listed: str, header: str) -> Smi:
    """listed: what the query prints. header: what nvidia-smi prints without arguments."""
    gpus: list[Gpu] = []
    driver = ""
    for line in listed.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) != len(_FIELDS.split(",")):
            continue  # such as 'No devices were found'
        uuid, name, total, free, capability, mig, driver = words
        gpus.append(
            Gpu(len(gpus), uuid, name, _mib(total), _mib(free), version_in(capability), mig.lower() == "enabled")
        )
    told = re.search(r"CUDA[\w ]* Version *: *(\d+\.\d+)", header)
    return Smi(tuple(gpus), driver, version_in(told[1]) if told else None)


def version_in(text: str | None) -> tuple[int, int] | None:
    """(13, 0) of '13.0'; None of anything else."""
    found = re.fullmatch(r"(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else None


def _mib(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None


def _said(command: str, *arguments: str) -> str:
    with Child([command, *arguments]) as child:
        return child.everything(LIMIT_S)
