"""Which checkpoint a rank reads, told by its bytes: two fine-tunes of one architecture differ in nothing else.

Read are sizes, the headers of safetensors, and 4 KiB from the middle of tensors: file by file of all that are no experts,
and of some 64 of experts; of other files some 64 pieces, spread evenly. What differs elsewhere only is not seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Final

from vllm_dwdp.errors import DwdpError

_SAMPLE_BYTES: Final = 4096
_SPREAD: Final = 64
_HEADER_BYTES: Final = 8


def fingerprint(files: Sequence[str]) -> dict[str, str]:
    """What has to be equal on all ranks, by what it is of; raises DwdpError where a file cannot be read."""
    headers, samples = hashlib.sha256(), hashlib.sha256()
    sizes: list[tuple[str, int]] = []
    for path in sorted(files, key=os.path.basename):
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                sizes.append((os.path.basename(path), size))
                header = _header(file, size) if path.endswith(".safetensors") else b""
                headers.update(header)
                for offset in _offsets(header, size):
                    file.seek(offset)
                    samples.update(file.read(_SAMPLE_BYTES))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DwdpError(f"{path} cannot be read as a checkpoint ({error}): fetch it again") from error
    listed = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:12]
    return {
        "checkpoint files": f"{len(sizes)} of {sum(size for _, size in sizes)} bytes ({listed})",
        "safetensors headers": headers.hexdigest()[:12],
        "sampled bytes": samples.hexdigest()[:12],
    }


def _header(file: BinaryIO | Any, size: int) -> bytes:
    length = int.from_bytes(file.read(_HEADER_BYTES), "little")
    if not 0 < length <= size:
        raise ValueError(f"a header of {length} bytes")
    return bytes(file.read(length))


def _offsets(header: bytes, size: int) -> Iterator[int]:
    if not header:
        yield from range(0, size, max(size // _SPREAD, 1))
        return
    begin = _HEADER_BYTES + len(header)
    dense: list[int] = []
    experts: list[int] = []
    for name, entry in sorted(json.loads(header).items()):
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            (experts if ".experts." in name else dense).append(begin + (first + last) // 2)
    yield from dense
    yield from experts[:: max(len(experts) // _SPREAD, 1)]
