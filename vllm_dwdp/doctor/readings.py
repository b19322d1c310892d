"""What child processes read (pure): plain values, so that they travel as JSON and tests make them up."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

_R = TypeVar("_R")


@dataclass(frozen=True)
class Unread:
    """why: one line. absent: it is not installed, rather than broken."""

    why: str
    absent: bool = False


@dataclass(frozen=True)
class Torch:
    """cuda: that it is built for, such as '13.0'; None for CPU. gpus: UUIDs of those it sees. trouble: why it sees none."""

    version: str
    cuda: str | None
    gpus: list[str]
    trouble: str = ""


@dataclass(frozen=True)
class Vllm:
    """refused: why this version is not one that was tested, in one line; '' where it is."""

    version: str
    refused: str = ""


@dataclass(frozen=True)
class Cupy:
    """cuda: of its runtime, as 1000 * major + 10 * minor."""

    version: str
    cuda: int


@dataclass(frozen=True)
class Offer:
    """One GPU, and memory of it that others may map.

    index: among those this process sees. driver_cuda: as 1000 * major + 10 * minor. handle: of a Handle; None where there
    is no IPC handle, with the reason in `refused`. vmm: whether memory can be given away as a file descriptor; None where
    cuda.bindings is missing. fabric: whether as a fabric handle too.
    """

    index: int
    uuid: str
    name: str
    driver_cuda: int
    handle: dict[str, Any] | None
    refused: str
    vmm: bool | None
    fabric: bool = False


@dataclass(frozen=True)
class Read:
    """What one GPU found when it read another one's memory from another process.

    reader, owner: indices. access: peer access; True for one GPU. refused: why it could not be mapped, else ''.
    rate: bytes/s, 0 where it could not be read. right: whether the bytes were the owner's.
    """

    reader: int
    owner: int
    access: bool
    refused: str
    rate: float
    right: bool


def decode(kind: type[_R], answer: dict[str, Any]) -> _R | Unread:
    """A reading from an answer of a child."""
    if "error" in answer:
        return Unread(str(answer["error"]), bool(answer.get("absent")))
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in answer.items() if name in names})
