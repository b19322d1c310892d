"""What the time of ranks is made of, from traces of vLLM's torch profiler: `python -m ci.bench.profiled TRACE...`.

The traces of one launch, all taken at the same time. Only the time that is in all of them counts: ranks of data parallel
launches that wait for one another would otherwise be seen waiting for one that still writes its trace.

Kernels overlap, so that the time of a kind is that in which at least one of its kernels ran, and kinds can add up to more
than "busy": the time in which anything ran but copies between devices. What is left of the span is idle.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import multiprocessing
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

#: Copies from and to other devices: they run beside kernels.
PULLS: Final = "pulls"
#: The first that matches a name of a kernel, or of an operator on CPU, is its kind.
_KINDS: Final = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("travelling tokens", r"^(ask|wait|merge|take|answer)_kernel"),
        ("copies", r"^mem(cpy|set)"),
        ("matrix products", r"^triton_tem_"),
        ("norms, routing", r"^triton_"),
        (
            "collectives",
            r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|all2all|cross_device_reduce|multimem|deep_?ep|c10d::",
        ),
        # Names of some tell what is fused into them, and would match below.
        (
            "experts",
            r"^persistent_kernel|split_gemm|moe_kernel|moe_wna16|moe_gemm|matmul_ogs|^_(p_)?matmul|finalize_matmul|"
            r"m_?grouped|grouped_gemm|batched_triton_kernel",
        ),
        (
            "attention",
            r"flash::|flash_|_flash|fmha|attn|attention|batch(prefill|decode)|reshape_and_cache|kv_cache|_mla_",
        ),
        (
            "norms, routing",
            r"norm|rotary|rope|topk|silu|gelu|swiglu|act_and_mul|moe_align|moe_sum|fused_mul_sum|expert_tokens|"
            r"expert_num_tokens|routing|bitmatrix|softmax",
        ),
        ("experts", r"moe|expert"),
        (
            "matrix products",
            r"gemm|gemv|nvjet|cublas|cutlass|xmma|splitk|marlin|::linear|matmul|(^|_|::)(add|b)?mm(_|$)",
        ),
    )
)
KINDS: Final = (
    "experts", "attention", "matrix products", "collectives", "travelling tokens", "norms, routing", "copies", PULLS,
    "other",
)  # fmt: skip
_DEVICE: Final = ("kernel", "gpu_memcpy", "gpu_memset")
#: What vLLM writes around a step that has requests.
_STEP: Final = "execute_"
#: Left out at the begin, where the profiler still sets itself up.
SETTLE_US: Final = 50e3
_NO_NUMBER: Final = re.compile(r'(": ?)-?(?:inf|nan)\b(?=\s*[,}])')
#: Names of kernels that are kept of each rank, and how much of one: those of templates are thousands of letters long.
_NAMES: Final = 12
_LETTERS: Final = 200

Interval = tuple[float, float]


class Event(NamedTuple):
    """Something that ran from `begin` to `end`, in microseconds of a clock that all processes of a machine share."""

    name: str
    kind: str
    begin: float
    end: float


class Trace(NamedTuple):
    """Of one rank. device: whether kernels were seen, not operators on CPU. steps: when each began."""

    rank: str
    device: bool
    begin: float
    end: float
    steps: list[float]
    events: list[Event]


@functools.cache
def kind_of(name: str) -> str:
    """One of KINDS but PULLS, by name alone."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def read(path: Path) -> Trace:
    """A file of torch's profiler, compressed or not; raises ValueError in one line where it is none."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode(errors="replace")
        # Kineto writes numbers as C++ prints them.
        found = json.loads(_NO_NUMBER.sub(r"\1 0", text), strict=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("traceEvents"), list):
        raise ValueError(f"{path.name}: it has no traceEvents: not written by torch's profiler")
    try:
        return parse(found, path.name.partition(".pt.trace")[0].rpartition(".")[0] or path.name)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name}: not written by torch's profiler: {type(error).__name__} {error}") from None


def parse(found: Mapping[str, Any], rank: str) -> Trace:
    """found: a trace as torch writes it. Raises ValueError where it does not say how long it is."""
    base = float(found.get("baseTimeNanoseconds", 0)) / 1e3
    whole = [each for each in found["traceEvents"] if each.get("ph") == "X"]
    span = next((each for each in whole if each.get("cat") == "Trace"), None)
    if span is None:
        raise ValueError(f"{rank}: the trace does not say when it began and ended")
    ran = [each for each in whole if each.get("cat") in _DEVICE]
    device = bool(ran or found.get("deviceProperties"))
    if device:
        # Copies of a graph have no name of their own; a stream without kernels is one that copies between devices.
        streams = {_stream(each) for each in ran if kind_of(each["name"]) != "copies"}
        kinds = [PULLS if _is_pull(each, streams) else kind_of(each["name"]) for each in ran]
    else:
        ran = _outermost(each for each in whole if each.get("cat") == "cpu_op")
        kinds = [kind_of(each["name"]) for each in ran]
    steps = [each for each in whole if each.get("cat") == "user_annotation" and each["name"].startswith(_STEP)]
    return Trace(
        rank,
        device,
        base + span["ts"],
        base + span["ts"] + span["dur"],
        [base + each["ts"] for each in steps],
        [
            Event(each["name"], kind, base + each["ts"], base + each["ts"] + each["dur"])
            for each, kind in zip(ran, kinds, strict=True)
        ],
    )


def _stream(event: Mapping[str, Any]) -> tuple[Any, Any]:
    return event.get("pid"), event.get("tid")


def _is_pull(event: Mapping[str, Any], streams: set[tuple[Any, Any]]) -> bool:
    name: str = event["name"]
    if "PtoP" in name:
        return True
    within = "DtoD" in name or name.startswith("memcpy")
    return within and _stream(event) not in streams


def _outermost(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Operators that no other one of their thread called."""
    ends: dict[Any, float] = {}
    kept = []
    for each in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
        thread = _stream(each)
        if each["ts"] >= ends.get(thread, 0.0):
            ends[thread] = each["ts"] + each["dur"]
            kept.append(each)
    return kept


def covered(intervals: Iterable[Interval]) -> float:
    """The length of their union."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        if end > until:
            total += end - max(begin, until)
            until = end
    return total


def summarise(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Of each rank, in ms: span, busy, idle, idle while a pull ran, kinds, and its longest names (sums, with their kind).

    Raises ValueError where ranks were not profiled at the same time.
    """
    begin = max((trace.begin for trace in traces), default=0.0) + SETTLE_US
    end = min((trace.end for trace in traces), default=0.0)
    if end <= begin:
        raise ValueError(f"{len(traces)} traces have no time in common but the first {SETTLE_US / 1e3:.0f} ms")
    return [_rank(trace, begin, end) for trace in traces]


def _rank(trace: Trace, begin: float, end: float) -> dict[str, Any]:
    by: dict[str, list[Interval]] = {kind: [] for kind in KINDS}
    names: dict[str, float] = {}
    for event in trace.events:
        if event.end > begin and event.begin < end:
            part = max(event.begin, begin), min(event.end, end)
            by[event.kind].append(part)
            name = event.name[:_LETTERS]
            names[name] = names.get(name, 0.0) + part[1] - part[0]
    busy = covered(part for kind, parts in by.items() if kind != PULLS for part in parts)
    either = covered(part for parts in by.values() for part in parts)
    longest = sorted(names, key=lambda name: -names[name])[:_NAMES]
    kinds_of = {event.name[:_LETTERS]: event.kind for event in trace.events}
    return {
        "rank": trace.rank,
        "device": trace.device,
        "span_ms": _ms(end - begin),
        "busy_ms": _ms(busy),
        "idle_ms": _ms(end - begin - busy),
        "idle_pulling_ms": _ms(either - busy),
        "steps": sum(begin <= at < end for at in trace.steps),
        "kinds": {kind: _ms(covered(parts)) for kind, parts in by.items()},
        "longest": {name: {"ms": _ms(names[name]), "kind": kinds_of[name]} for name in longest},
    }


def _ms(microseconds: float) -> float:
    return round(microseconds / 1e3, 3)


def _in_order(path: Path) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def main() -> int:
    """Read traces, print what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, help="one of each rank")
    parser.add_argument("--json", action="store_true", help="write JSON instead of a table")
    args = parser.parse_args()
    paths = sorted(args.traces, key=_in_order)
    try:
        if len(paths) == 1:
            traces = [read(paths[0])]
        else:
            with ProcessPoolExecutor(min(len(paths), 8), multiprocessing.get_context("fork")) as pool:
                traces = list(pool.map(read, paths))
        ranks = summarise(traces)
    except ValueError as error:
        print(f"profiled: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(ranks))
    else:
        from ci.bench.profiled_table import table

        print(table({"traces": {"all": ranks}}), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
