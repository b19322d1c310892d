"""How often each expert was hit, as a file: written by ranks (`dwdp.hits`), read to place experts (`dwdp.popularity`).

One file for all ranks of a launch. A rank replaces its own part, under a lock on the folder, and renames the whole into
place: ranks that end at once lose nothing, and a reader sees no half of it.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vllm_dwdp.errors import DwdpError, DwdpTimeout

FORMAT: Final = "vllm-dwdp hits"
VERSION: Final = 1
LOCK_TIMEOUT_S: Final = 5.0
_PERIOD_S: Final = 0.01


@dataclass(frozen=True)
class Hits:
    """Counts since the start, of one rank or of several.

    tokens: tokens that went through a layer (the most of any). layers: vLLM's name of a MoE layer -> [expert] -> tokens
    that were sent to it.
    """

    tokens: int
    layers: Mapping[str, tuple[int, ...]]

    def of(self, layer: str, num_experts: int) -> tuple[int, ...]:
        """[expert] -> hits of one layer; raises DwdpError where it was not counted, or with another number of experts."""
        counts = self.layers.get(layer)
        if counts is None:
            raise DwdpError(
                f"dwdp.popularity has no layer {layer}, but {len(self.layers)} others such as {next(iter(self.layers))}: "
                "count hits with this model"
            )
        if len(counts) != num_experts:
            raise DwdpError(
                f"dwdp.popularity has {len(counts)} experts for {layer}, which has {num_experts}: "
                "count hits with this model"
            )
        return counts


def add_hits(parts: Sequence[Hits]) -> Hits:
    """The hits of several ranks as one; they have the same layers."""
    layers = {
        name: tuple(map(sum, zip(*(part.layers[name] for part in parts), strict=True))) for name in parts[0].layers
    }
    return Hits(sum(part.tokens for part in parts), layers)


def write_hits(path: str, launch: str, model: str, rank: int, hits: Hits) -> None:
    """Put the part of `rank` into the file at `path`, which keeps the parts of other ranks of the same `launch` only.

    Raises:
        DwdpTimeout: another process held the folder's lock for LOCK_TIMEOUT_S.
        DwdpError: the file cannot be written.
    """
    # One name for all, under the lock: what a killed rank leaves, the next write takes.
    temporary = f"{path}.part"
    try:
        with _locked(os.path.dirname(os.path.abspath(path))):
            ranks = _ranks_of(path, launch)
            ranks[str(rank)] = {"tokens": hits.tokens, "layers": hits.layers}
            whole = {"format": FORMAT, "version": VERSION, "launch": launch, "model": model, "ranks": ranks}
            try:
                with open(temporary, "w", encoding="utf-8") as file:
                    json.dump(whole, file)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
    except OSError as error:
        raise DwdpError(f"dwdp.hits cannot write {path} ({error.strerror}): name a file in a folder of yours") from None


def _ranks_of(path: str, launch: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        return dict(found["ranks"]) if found["launch"] == launch else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold the lock of a folder, which leaves no file behind as a lock file would."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DwdpTimeout(
                        f"dwdp.hits waited {LOCK_TIMEOUT_S:.0f} s for the lock of {folder}: another process holds it"
                    ) from None
                time.sleep(_PERIOD_S)
        yield
    finally:
        os.close(fd)


def read_hits(path: str) -> Hits:
    """The hits of all ranks in the file at `path`; raises DwdpError where there is none, or it is not one."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        # Of a pipe that nobody writes to, the end never comes.
        raise DwdpError(f"dwdp.popularity is {path}, which is no plain file: name one that dwdp.hits wrote")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise DwdpError(
            f"dwdp.popularity is {path}, which cannot be read ({error.strerror}): name a file that dwdp.hits wrote"
        ) from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DwdpError(f"dwdp.popularity is {path}, which is no file of dwdp.hits: name one that dwdp.hits wrote")
    if found.get("version") != VERSION:
        raise DwdpError(
            f"dwdp.popularity is {path} of version {found.get('version')!r}, not {VERSION}: count hits with this vllm-dwdp"
        )
    try:
        hits = add_hits([_part(part) for part in found["ranks"].values()])
    except (LookupError, TypeError, ValueError, AttributeError):
        raise DwdpError(f"dwdp.popularity is {path}, which is damaged: count hits once more") from None
    if not any(map(any, hits.layers.values())):
        raise DwdpError(f"dwdp.popularity is {path}, in which no expert was hit: count hits while requests are served")
    return hits


def _part(part: Mapping[str, Any]) -> Hits:
    layers = {str(name): tuple(counts) for name, counts in part["layers"].items()}
    for count in (part["tokens"], *(count for counts in layers.values() for count in counts)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(count)
    return Hits(part["tokens"], layers)
