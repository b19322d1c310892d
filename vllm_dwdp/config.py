"""DwdpConfig: everything a user can set under `--additional-config '{"dwdp": {...}}'`."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.placement import check_share
from vllm_dwdp.platform import Platform

TransportName = Literal["auto", "cupy_ipc", "vmm", "cuda_pinned", "shm"]
ViewName = Literal["auto", "split", "composite", "contiguous", "inplace"]
LauncherName = Literal["auto", "ray", "mp", "uni"]
DecodeName = Literal["auto", "travel", "direct"]

MIN_SLICE_BYTES: Final = 4096
SLICE_MULTIPLE: Final = 256

_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "transport": get_args(TransportName),
    "weight_view": get_args(ViewName),
    "launcher": get_args(LauncherName),
    "decode": get_args(DecodeName),
}
_LEAST: Final[dict[str, int]] = {
    "group_size": 2,
    "experts_per_rank": 1,
    "num_slots": 2,
    "slice_bytes": MIN_SLICE_BYTES,
    "ranks_per_device": 1,
    "direct_tokens": 0,
    "travel_tokens": 1,
    "rank": 0,
    "ranks": 2,
}
_OPTIONAL: Final = frozenset({"group_size", "experts_per_rank", "slice_bytes", "rank", "ranks"})
#: More than anybody waits; locks and sockets take no more than 9e9 seconds.
MAX_TIMEOUT_S: Final = 1e9
#: What only a server has that is one rank of a group.
_OF_A_RANK: Final = ("rank", "ranks", "meet")
#: A rank beyond `ranks` is an extra one; a number far beyond is a mistake, a port say.
MAX_EXTRA: Final = 64
_GROUP_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
#: Counts that may also be left to dwdp, with this word.
AUTO: Final = "auto"
#: E/N experts, also where the default would be more.
PARTITION: Final = "partition"
_WORDS: Final[dict[str, tuple[str, ...]]] = {"experts_per_rank": (AUTO, PARTITION), "direct_tokens": (AUTO,)}
#: What could be set once.
_GONE: Final = frozenset({"in_flight", "rendezvous"})


@dataclass(frozen=True)
class DwdpConfig:
    """The settings of one DWDP start, valid by construction.

    group_size: ranks that share one copy of the experts; None means all ranks.
    experts_per_rank: experts resident on a rank; more than E/N means overlap, "auto" as many as the KV cache leaves room
        for (hold.py), "partition" E/N. None means "partition" on CPU; on GPUs "auto", or a partition where memory cannot be
        foreseen.
    num_slots: prefetch buffers per rank. slice_bytes: the most bytes of one copy; None means 1 MiB on CPU,
        whole ranges on GPUs.
    ranks_per_device: ranks that share one accelerator. timeout_s: limit of every wait, in seconds.
    trace: record the times of acquire, ready, release and of every copy.
    require_win: refuse to start where the planner predicts a loss, or cannot tell.
    direct_tokens: most tokens of a forward that reads missing experts where they are; 0 pulls always, "auto" is found from
        rates measured at start.
    decode: how such a forward, of few tokens, gets at missing experts: "travel" has their owners compute for its tokens, and
        reads directly where one does not answer in time; "direct" reads always; "auto" travels where that is
        possible, but for one token or two that are faster read, where nearly all experts are held.
    travel_tokens: most tokens of a forward whose tokens travel.
    hits: file into which ranks write how often each expert was hit. popularity: such a file, by which experts beyond
        E/N are chosen.
    group: name of a group of servers, of which this one is `rank` of `ranks`, or an extra one, from `ranks` on, which has
        the share of rank % ranks; None where one launch has all ranks. meet: the folder in which such a group has its own.
    """

    group_size: int | None = None
    experts_per_rank: int | Literal["auto", "partition"] | None = None
    num_slots: int = 2
    slice_bytes: int | None = None
    transport: TransportName = "auto"
    weight_view: ViewName = "auto"
    launcher: LauncherName = "auto"
    ranks_per_device: int = 1
    timeout_s: float = 300.0
    trace: bool = False
    require_win: bool = False
    hits: str | None = None
    popularity: str | None = None
    direct_tokens: int | Literal["auto"] = "auto"
    decode: DecodeName = "auto"
    travel_tokens: int = 1024
    group: str | None = None
    rank: int | None = None
    ranks: int | None = None
    meet: str | None = None

    def __post_init__(self) -> None:
        for key, least in _LEAST.items():
            _check_count(key, getattr(self, key), least)
        for key, choices in _CHOICES.items():
            _check_choice(key, getattr(self, key), choices)
        if self.slice_bytes is not None and self.slice_bytes % SLICE_MULTIPLE:
            raise DwdpError(
                f"dwdp.slice_bytes is {self.slice_bytes}: it must be a multiple of {SLICE_MULTIPLE}; "
                f"{self.slice_bytes // SLICE_MULTIPLE * SLICE_MULTIPLE} is the nearest below"
            )
        limit: object = self.timeout_s
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not (0 < limit <= MAX_TIMEOUT_S):
            raise DwdpError(
                f"dwdp.timeout_s is {limit!r}: it must be a finite number of seconds above 0, at most {MAX_TIMEOUT_S:g}, "
                "such as 300"
            )
        for key in ("trace", "require_win"):
            if not isinstance(getattr(self, key), bool):
                raise DwdpError(f"dwdp.{key} is {getattr(self, key)!r}: it must be true or false")
        for key in ("hits", "popularity"):
            path: object = getattr(self, key)
            if path is not None and (not isinstance(path, str) or not path):
                raise DwdpError(f"dwdp.{key} is {path!r}: it must be the path of a file")
        for message in _apart(self):
            raise DwdpError(message)

    @classmethod
    def parse(cls, raw: object) -> "DwdpConfig":
        """Read the value of `additional_config["dwdp"]`; None (no such key) gives the defaults. Raises DwdpError."""
        if raw is None:
            return cls()
        if not isinstance(raw, dict):
            raise DwdpError(f"additional_config['dwdp'] is {raw!r}: it must be a mapping such as {{'num_slots': 2}}")
        known = [field.name for field in fields(cls)]
        for key in raw:
            if key in _GONE:
                raise DwdpError(f"dwdp.{key} is {raw[key]!r}, a setting that is gone: leave it out")
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
                raise DwdpError(f"additional_config['dwdp'] has the unknown key {key!r} = {raw[key]!r}: {hint}")
        return cls(**raw)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping that `parse` turns back into an equal config."""
        return asdict(self)

    def compiled_by(self) -> dict[str, Any]:
        """What names the caches of compiled code: all settings but those that no compiled code sees.

        `hits` is whether layers count, not where to. `rank` and `group` stay, although compiled code may not depend on them:
        vLLM has one folder for all servers of the same settings, and writes the index there in place (save_to_file of
        vllm/compilation/backends.py), so that a server which starts beside another one may read half of it, and end.
        """
        seen = {key: value for key, value in self.to_dict().items() if key not in ("meet", "timeout_s", "trace")}
        return {**seen, "hits": self.hits is not None}

    @property
    def held(self) -> int | None:
        """`experts_per_rank` as far as it is a number: None for a partition, and until ranks have chosen."""
        return None if isinstance(self.experts_per_rank, str) else self.experts_per_rank

    def goes_by_memory(self, platform: Platform) -> bool:
        """Whether ranks choose their number of experts; without a setting on GPUs of their own, where more is faster.

        Servers of a group do not: they start when memory is not what it was.
        """
        if self.experts_per_rank is None:
            return not platform.on_cpu and self.ranks_per_device == 1 and self.group is None
        return self.experts_per_rank == AUTO

    def resolve_slice_bytes(self, platform: Platform) -> int | None:
        """The most bytes of one copy; None for whole ranges."""
        return platform.slice_bytes if self.slice_bytes is None else self.slice_bytes

    def resolve_group_size(self, num_ranks: int) -> int:
        """The ranks per group, N; raises DwdpError when `num_ranks` cannot be split into such groups."""
        if num_ranks < 2:
            raise DwdpError(
                f"dwdp needs at least 2 ranks but --data-parallel-size is {num_ranks}: raise it, or leave dwdp out"
            )
        size = num_ranks if self.group_size is None else self.group_size
        if size > num_ranks or num_ranks % size:
            divisors = ", ".join(str(n) for n in range(2, num_ranks + 1) if num_ranks % n == 0)
            raise DwdpError(
                f"dwdp.group_size is {size} but --data-parallel-size is {num_ranks}: set a divisor of it, {divisors}"
            )
        return size

    def check(self, num_ranks: int, num_experts: int | None) -> None:
        """Check against the number of ranks and, where known, the routed experts of a layer; raises DwdpError."""
        size = self.resolve_group_size(num_ranks)
        if num_experts is not None:
            check_share(num_experts, size, self.held)


def _apart(config: DwdpConfig) -> Iterator[str]:
    """What is wrong with the settings of a server that is one rank of a group."""
    if config.group is None:
        for key in _OF_A_RANK:
            if (told := getattr(config, key)) is not None:
                yield f"dwdp.{key} is {told!r} without dwdp.group: name the group of this server, or leave it out"
        return
    group: object = config.group
    if not isinstance(group, str) or not _GROUP_NAME.fullmatch(group):
        yield f"dwdp.group is {group!r}: it must be a name of at most 40 letters, digits, dots, dashes and underscores"
    for key in ("rank", "ranks"):
        if getattr(config, key) is None:
            yield f"dwdp.group is {group!r} without dwdp.{key}: give each of its servers rank, 0 to ranks - 1, and ranks"
    if (config.rank or 0) >= (ranks := config.ranks or 0) + MAX_EXTRA:
        yield (
            f"dwdp.rank is {config.rank} of {ranks} ranks: it must be 0 to {ranks - 1}, or for an extra rank {ranks} to "
            f"{ranks + MAX_EXTRA - 1}"
        )
    meet: object = config.meet
    if isinstance(meet, str) and re.fullmatch(r"[^/]+:\d+", meet):
        yield (
            f"dwdp.meet is {meet!r}, an address: this release joins servers of one machine only; give the path of a folder "
            "there, or leave meet out"
        )
    if meet is not None and (not isinstance(meet, str) or not meet.startswith("/")):
        yield f"dwdp.meet is {meet!r}: it must be the absolute path of a folder"
    if config.group_size is not None:
        yield f"dwdp.group_size is {config.group_size} with dwdp.group, whose size is dwdp.ranks: leave group_size out"
    if config.experts_per_rank == AUTO:
        yield (
            'dwdp.experts_per_rank is "auto" with dwdp.group, whose servers start when memory is not what it was: give a '
            'number, or "partition"'
        )
    if config.launcher == "ray":
        yield 'dwdp.launcher is "ray" with dwdp.group, where each server has its worker beside it: leave launcher out'


def _check_count(key: str, value: object, least: int) -> None:
    words = _WORDS.get(key, ())
    if (value is None and key in _OPTIONAL) or value in words:
        return
    if isinstance(value, str) and words:
        close = difflib.get_close_matches(value.lower(), words, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        listed = ", ".join(map(repr, words))
        raise DwdpError(f"dwdp.{key} is {value!r}: it must be {listed} or a whole number >= {least}{hint}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise DwdpError(f"dwdp.{key} is {value!r} of type {type(value).__name__}: it must be a whole number >= {least}")
    if value < least:
        raise DwdpError(f"dwdp.{key} is {value}: it must be >= {least}; raise it or leave it out")


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DwdpError(f"dwdp.{key} is {value!r}: it must be one of {', '.join(choices)}{hint}")
