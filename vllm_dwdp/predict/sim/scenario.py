"""Scenario files (TOML): a fleet, its load, what goes wrong, and the ways to compare on the same arrivals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Final, get_args

from vllm_dwdp.config import DecodeName
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.arguments import MOST_STEP_TOKENS, MOST_TOKENS
from vllm_dwdp.predict.decode import TRAVEL_TOKENS, predicted_few
from vllm_dwdp.predict.decode_pool import TRANSFER_RATE
from vllm_dwdp.predict.formats import KV_BYTES
from vllm_dwdp.predict.hardware_file import Hardware, known_keys, load_hardware
from vllm_dwdp.predict.input_files import read_toml, understood
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.read_config import load_model
from vllm_dwdp.predict.sim.groups import Fault
from vllm_dwdp.predict.sim.requests import Stream
from vllm_dwdp.predict.strategies import PLAIN, Options, check_group, pull_bytes
from vllm_dwdp.predict.travel import Few
from vllm_dwdp.predict.units import parse_count, parse_quantity
from vllm_dwdp.predict.work import Lengths

WAYS: Final = ("DWDP", "DEP", "TP", "DP")
_TOP: Final = {
    "model", "hardware", "ranks", "group_size", "seconds", "seed", "ways", "tokens_per_step", "max_sequences",
    "experts_per_rank", "weight_view", "kv_cache_dtype", "expert_format", "linear_format", "requests", "faults", "decode",
    "travel_tokens", "decode_pool",
}  # fmt: skip
#: What a run may be made of: twice the largest in docs/predict.md, which takes three minutes; and a group's requests, which
#: are in memory together.
MOST_EVENTS: Final = 2e8
MOST_REQUESTS: Final = 2e6
MOST_SLOW: Final = 1e6
_REQUESTS: Final = {"rate", "isl", "length_ratio", "isl_std", "osl", "burst", "hit_rate", "hit_share"}
_POOL: Final = {"way", "ranks", "group_size", "max_sequences", "transfer_rate"}
#: Of a pool that decodes, and of one of its ranks.
MOST_RANKS_OF_A_POOL: Final = 1 << 20
MOST_SEQUENCES: Final = 4096
_FAULT: Final = {"rank", "slow", "stall_at", "stall_for", "dead_at"}


#: Events of a request that is decoded elsewhere: it comes, and ends.
_DECODE_EVENTS: Final = 3


@dataclass(frozen=True)
class DecodePool:
    """`ranks` accelerators beside those that compute prompts, engines of `group_size` that run `way` (DEP, TP, DP).

    max_sequences: of a rank. transfer: bytes/s of the KV cache from one accelerator, and to one.
    """

    way: str
    ranks: int
    group_size: int
    max_sequences: int
    transfer: float


@dataclass(frozen=True)
class Scenario:
    """A run. `ranks` accelerators in groups of `group_size`; `seconds` of simulated time. decode, travel_tokens: as in
    `DwdpConfig`. pool: where requests are decoded, if not by the ranks that computed their prompts."""

    model: MoeModel
    hardware: Hardware
    ranks: int
    group_size: int
    seconds: float
    seed: int
    ways: tuple[str, ...]
    tokens_per_step: int
    max_sequences: int
    stream: Stream
    faults: dict[int, Fault]
    share: int | None = None
    merge: bool = False
    options: Options = PLAIN
    decode: str = "auto"
    travel_tokens: int = TRAVEL_TOKENS
    pool: DecodePool | None = None

    def few(self) -> Few:
        """Steps of how many tokens travel, or read directly; raises DwdpError where tokens should travel and cannot."""
        return predicted_few(
            self.model, self.hardware, self.group_size, self.share, view="contiguous" if self.merge else "split",
            decode=self.decode, travel_tokens=self.travel_tokens,
        )  # fmt: skip


def _tables(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DwdpError(f"{where}: faults is {value!r}: write each as a table [[faults]]")
    return value


def load_scenario(path: str, seed: int | None = None, disaggregated: bool = False) -> Scenario:
    """Read a scenario file; `seed` replaces its own. disaggregated: with its [decode_pool], which is left out otherwise.
    Raises DwdpError in one line."""
    raw = read_toml(path, "scenario", "give a TOML file")
    scenario = parse_scenario(raw, path, disaggregated)
    return scenario if seed is None else replace(scenario, seed=seed)


def parse_scenario(raw: dict[str, Any], where: str, disaggregated: bool = False) -> Scenario:
    """See `load_scenario`."""
    with understood(where):
        return _scenario(raw, where, disaggregated)


def _scenario(raw: dict[str, Any], where: str, disaggregated: bool) -> Scenario:
    known_keys(raw, _TOP, where, "")
    load = raw.get("requests")
    if not isinstance(load, dict):
        raise DwdpError(f"{where}: [requests] is missing: add it with rate (requests/s and rank), isl and osl")
    known_keys(load, _REQUESTS, where, "requests.")
    for key in ("model", "hardware", "expert_format", "linear_format"):
        if not isinstance(raw.get(key, None if key in ("model", "hardware") else ""), str):
            raise DwdpError(f"{where}: {key} is {raw.get(key)!r}: give its name or path as text")
    ranks = parse_count(raw.get("ranks"), f"{where}: ranks", 1)
    size = parse_count(raw.get("group_size", ranks), f"{where}: group_size", 2)
    if ranks % size:
        raise DwdpError(f"{where}: {ranks} ranks cannot be split into groups of {size}: change ranks or group_size")
    model = load_model(raw["model"], raw.get("expert_format"), raw.get("linear_format"))
    hardware = load_hardware(raw["hardware"])
    check_group(hardware, size)
    given = raw.get("ways", list(WAYS[:3]))
    if not isinstance(given, list) or not given:
        raise DwdpError(f"{where}: ways is {given!r}: write a list such as ['DWDP', 'DEP']")
    ways = tuple(given)
    for way in ways:
        if way not in WAYS or given.count(way) > 1:
            raise DwdpError(f"{where}: ways has {way!r}: it may have {', '.join(WAYS)}, each once")
    share = raw.get("experts_per_rank")
    if share is not None:
        share = parse_count(share, f"{where}: experts_per_rank")
    pull_bytes(model, size, share)
    view = raw.get("weight_view", "split")
    if view not in ("split", "contiguous"):
        raise DwdpError(f"{where}: weight_view is {view!r}: it must be split or contiguous")
    kv = raw.get("kv_cache_dtype", "auto")
    if not isinstance(kv, str) or kv not in KV_BYTES:
        raise DwdpError(f"{where}: kv_cache_dtype is {kv!r}: it must be one of {', '.join(KV_BYTES)}")
    scenario = Scenario(
        model=model,
        hardware=hardware,
        ranks=ranks,
        group_size=size,
        seconds=parse_quantity(raw.get("seconds", "600 s"), "seconds", f"{where}: seconds"),
        seed=parse_count(raw.get("seed", 0), f"{where}: seed", 0),
        ways=ways,
        tokens_per_step=_at_most(MOST_STEP_TOKENS, raw.get("tokens_per_step", 8192), f"{where}: tokens_per_step"),
        max_sequences=_at_most(MOST_STEP_TOKENS, raw.get("max_sequences", 256), f"{where}: max_sequences"),
        stream=_stream(load, where),
        faults=_faults(_tables(raw.get("faults", []), where), ranks, where),
        share=share,
        merge=view == "contiguous",
        options=Options(kv_element=KV_BYTES[kv]),
        decode=_one_of(get_args(DecodeName), raw.get("decode", "auto"), f"{where}: decode"),
        travel_tokens=_at_most(MOST_STEP_TOKENS, raw.get("travel_tokens", TRAVEL_TOKENS), f"{where}: travel_tokens"),
        pool=_pool(raw.get("decode_pool"), model, hardware, where) if disaggregated else None,
    )
    scenario.few()
    _check_size(scenario, where)
    return scenario


def _check_size(s: Scenario, where: str) -> None:
    """Refuse what would take hours, or more memory than there is, before anything is drawn."""
    load = s.stream
    requests = load.rate * s.seconds * s.group_size
    if requests > MOST_REQUESTS:
        raise DwdpError(
            f"{where}: a group of {s.group_size} ranks has about {requests:.2g} requests ({load.rate:g} per second and "
            f"rank, {s.seconds:g} s): {MOST_REQUESTS:g} are the most; lower requests.rate or seconds"
        )
    prompt = load.lengths.isl + 3 * load.lengths.std
    out = load.osl if s.pool is None else _DECODE_EVENTS
    steps = requests / s.group_size * s.ranks * (ceil(prompt / s.tokens_per_step) + out)
    # A step of DEP looks at every rank of its group; a rank without requests still has to be drawn.
    ranks = s.ranks + (0 if s.pool is None else s.pool.ranks)
    events = sum((steps * (1 + s.group_size / 16) if way == "DEP" else steps) + 10 * ranks for way in s.ways)
    if events > MOST_EVENTS:
        raise DwdpError(
            f"{where}: about {events:.2g} events ({s.ranks} ranks, {steps:.2g} prompt steps and tokens, {len(s.ways)} "
            f"ways): {MOST_EVENTS:g} are the most, some minutes; lower ranks, requests.rate, seconds, isl or osl"
        )


def _pool(raw: Any, model: MoeModel, hardware: Hardware, where: str) -> DecodePool:
    if not isinstance(raw, dict):
        raise DwdpError(
            f"{where}: [decode_pool] is missing: add it with ranks, group_size and way, or leave --disaggregated out"
        )
    known_keys(raw, _POOL, where, "decode_pool.")
    here = f"{where}: decode_pool."
    way = _one_of(WAYS[1:], raw.get("way", "DEP"), f"{here}way")
    ranks = _at_most(MOST_RANKS_OF_A_POOL, raw.get("ranks"), f"{here}ranks")
    size = 1 if way == "DP" else parse_count(raw.get("group_size", ranks), f"{here}group_size", 2)
    if ranks % size:
        raise DwdpError(
            f"{here}ranks is {ranks}, which cannot be split into engines of {size}: change it or group_size"
        )
    if size > 1:
        check_group(hardware, size)
    if size > model.experts:
        raise DwdpError(f"{here}group_size is {size}: {model.name} has {model.experts} experts")
    sequences = _at_most(MOST_SEQUENCES, raw.get("max_sequences", 256), f"{here}max_sequences")
    transfer = parse_quantity(raw.get("transfer_rate", TRANSFER_RATE), "bytes/s", f"{here}transfer_rate")
    return DecodePool(way, ranks, size, sequences, transfer)


def _one_of(known: tuple[str, ...], value: Any, what: str) -> str:
    if value not in known:
        raise DwdpError(f"{what} is {value!r}: it must be one of {', '.join(known)}")
    return str(value)


def _at_most(most: int, value: Any, what: str) -> int:
    found = parse_count(value, what)
    if found > most:
        raise DwdpError(f"{what} is {value!r}: it must be at most {most}")
    return found


def _stream(load: dict[str, Any], where: str) -> Stream:
    def number(key: str, default: float | None, low: float, high: float) -> float:
        value = load.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise DwdpError(f"{where}: requests.{key} is {value!r}: it must be a number in {low:g}..{high:g}")
        return float(value)

    lengths = Lengths(
        _at_most(MOST_TOKENS, load.get("isl", 8192), f"{where}: requests.isl"),
        number("length_ratio", 1.0, 0.001, 1.0),
        number("isl_std", 0.0, 0.0, 1e9),
    )
    return Stream(
        rate=number("rate", None, 1e-6, 1e6),
        lengths=lengths,
        osl=_at_most(MOST_TOKENS, load.get("osl", 1), f"{where}: requests.osl"),
        burst=number("burst", 1.0, 1.0, 1e4),
        hit_rate=number("hit_rate", 0.0, 0.0, 1.0),
        hit_share=number("hit_share", 0.5, 0.0, 0.99),
    )


def _faults(raw: Any, ranks: int, where: str) -> dict[int, Fault]:
    faults: dict[int, Fault] = {}
    for entry in raw:
        known_keys(entry, _FAULT, where, "faults.")
        rank = parse_count(entry.get("rank"), f"{where}: faults.rank", 0)
        if rank >= ranks:
            raise DwdpError(f"{where}: faults.rank is {rank}: there are ranks 0..{ranks - 1}")
        if rank in faults:
            raise DwdpError(f"{where}: faults names rank {rank} twice: write all that is wrong with it into one table")
        values: dict[str, float] = {}
        for key in ("stall_at", "stall_for", "dead_at"):
            if key in entry:
                values[key] = parse_quantity(entry[key], "seconds", f"{where}: faults.{key}")
        slow = entry.get("slow", 1.0)
        if isinstance(slow, bool) or not isinstance(slow, int | float) or not 1 <= slow <= MOST_SLOW:
            raise DwdpError(
                f"{where}: faults.slow is {slow!r}: it must be a number of at least 1 (times slower), and <= {MOST_SLOW:g}"
            )
        if ("stall_at" in values) != ("stall_for" in values):
            raise DwdpError(
                f"{where}: a stall of rank {rank} needs both stall_at and stall_for, such as '60 s' and '10 s'"
            )
        faults[rank] = Fault(slow=float(slow), **values)
    return faults
