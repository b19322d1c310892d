"""The stages of gpu.py and their steps: commands, time limits, and what of them can be tried without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

STAGE_LIMIT_S = 470
#: memcheck sees a read past a tensor only where every tensor has an allocation of its own.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Step:
    """One command. `{out}` in its words is the results' folder; trial: its words without a GPU, None where it needs one.

    gpus: how many it is made for; it sees no more.
    """

    name: str
    words: tuple[str, ...]
    limit_s: float
    trial: tuple[str, ...] | None = None
    env: dict[str, str] = field(default_factory=dict)
    gpus: int = 1


def _script(name: str, *more: str) -> tuple[str, ...]:
    return ("python", "-m", f"ci.{name}", *more)


def _kernels(name: str, *more: str) -> tuple[str, ...]:
    return ("python", "-m", "vllm_dwdp.kernels.bench" + (f".{name}" if name else ""), *more)


def _checked(tool: str, *cases: str) -> tuple[str, ...]:
    more = ("--case", *cases) if cases else ()
    return (*_checker(tool), *_kernels("sanitize", "--limit-s", "60", *more))


def _loads(name: str, *more: str, gpus: int = 2) -> Step:
    """Servers under load."""
    # What is in `more` may end with words for the servers.
    words = ("--limit-s", "440", "--start-s", "240", "--json", f"{{out}}/{name.replace(' ', '-')}.json", *more)
    return Step(name, _script("bench.loads", *words), 470, None, gpus=gpus)


def _travel(name: str, *more: str, limit_s: float = 200) -> Step:
    """A layer whose tokens travel."""
    file = name.replace("tokens that ", "").replace(",", "").replace(" ", "-")
    return Step(name, _script("bench.travel", "--json", f"{{out}}/{file}.json", *more), limit_s, None, gpus=2)


def _checker(tool: str) -> tuple[str, ...]:
    return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")


#: The rest is the same on one GPU and on two.
LINK_CASES = "qwen3-split,qwen3-full-split,qwen3-ray,qwen3-serve,deepseek-fp8-split,big-qwen3-split-4"
THREE, FIVE = ("--parallel", "3", "--limit-s", "280"), ("--parallel", "5", "--limit-s", "440")
TINY = ("--device", "cpu", "--tiny")
BENCH = ("--both", "--alike", "--limit-s", "400")
#: A shortened play of two ranks: under a memory checker everything takes fifty times as long.
PAIR = ("--only", "pair", "--acquires", "60", "--limit", "140", "--json", "{out}/pair.json")
#: Two H200s hold two systems with all layers of that model.
WHOLE = ("--layers", "48")
HALF = 'dwdp:dwdp64:{{"experts_per_rank": 64}}'
PAGED = 'dwdp:composite:{{"experts_per_rank": 64, "weight_view": "composite"}}'
MARLIN = ("--more", "--moe-backend", "marlin")
STEADY = ("prefill8k=8192/1/16", "apart8k=8192/1/16,spread=0.8", "mixed=8192/128/16")
MXFP4 = ("--loads", *STEADY, *MARLIN)
#: Layers of large models: two systems, as many layers as fit beside each other in 80 GB, and what their steps are made of.
LAYERS_AT_SIZE = ("--loads", STEADY[0], "decode64=512/128/64", "--profile")
#: Those of all sizes take 4 GiB of each of the two, which is what a fourth layer lacks.
FEW_GRAPHS = ("--more", "--max-cudagraph-capture-size", "64")
HALF_OF_256 = 'dwdp:dwdp128:{{"experts_per_rank": 128}}'
HELD_112 = (
    'dwdp:auto112:{{"experts_per_rank": 112}}',
    'dwdp:direct112:{{"experts_per_rank": 112, "decode": "direct"}}',
)
DECODE = ("decode64=512/128/64", "decode8=512/128/8", "decode1=512/128/1")
LAUNCHERS = (
    'dwdp:uni:{{"experts_per_rank": 112, "launcher": "uni"}}',
    'dwdp:mp:{{"experts_per_rank": 112, "launcher": "mp"}}',
)
SOAK = ("--long", "500", "--concurrency", "64", "--part", "10000")
#: On four GPUs, where shares of 32 experts partition a layer, and where pairs of ranks share them.
QUARTER = 'dwdp:dwdp32:{{"experts_per_rank": 32}}'
PAIRS = 'dwdp:groups-of-two:{{"group_size": 2, "experts_per_rank": 64}}'
FOUR = ("prefill8k=8192/1/32", "mixed=8192/128/32", "decode64=512/128/64")
MORE_OF_FOUR = ("uneven=8192/1/32,every=2,uneven", "apart8k=8192/1/32,spread=0.8", "decode8=512/128/8")
SHORT = ("--kv-gib", "2", "--turns", "3")
#: Two GPUs compute prompts, two decode. With vLLM's blocks of 16 tokens NIXL's lists of blocks take longer than the bytes.
APART = ("--turns", "3", "--kv-gib", "8", "--decode", "tp", "--prefill-devices", "2")
APART_LOADS = ("--loads", "pd64=8192/128/64", "pd32=8192/128/32", "--more", "--block-size", "128")
#: A rank that returns to quantised experts, and an extra one on the fourth GPU: three starts, which CUDA graphs would take
#: beyond the limit of a stage.
EXTRA = ("--ranks", "3", "--extra", "--eager", "--model", "qwen3-fp8", "--layers", "5", "--limit-s", "450")
TIMED = ("uneven=8192/1/16,every=2,uneven", "bursts=8192/1/16,every=3,burst,spread=0.8")
STAGES: dict[str, tuple[Step, ...]] = {
    "kernels": (
        Step(
            "accuracy",
            _kernels("accuracy", "--limit-s", "100", "--json", "{out}/accuracy.json"),
            150,
            (
                *("env", "TRITON_INTERPRET=1"),
                *_kernels("accuracy", *TINY, "--seed", "1", "--json", "{out}/accuracy.json"),
            ),
        ),
        Step("results", _kernels("sanitize", "--limit-s", "60"), 90),
        Step("tune", _kernels("tune", "--folder", "{out}/tables", "--limit-s", "150"), 180),
        Step(
            "bench",
            _kernels("", "--goal", *BENCH, "--tables", "{out}/tables", "--json", "{out}/kernels.json"),
            460,
            ("env", "TRITON_INTERPRET=1", *_kernels("", *TINY, "--tokens", "3", "--json", "{out}/kernels.json")),
        ),
    ),
    "e2e": (
        Step(
            "engines",
            _script("checks.gpu_e2e", *FIVE, "--json", "{out}/e2e.json"),
            460,
            _script("checks.gpu_e2e", "--cpu", "--only", "qwen3-contiguous", "--json", "{out}/e2e.json"),
        ),
        Step(
            "quantised experts",
            _script(
                "checks.gpu_e2e", "--quantised", "--parallel", "5", "--limit-s", "450", "--json", "{out}/forms.json"
            ),
            470,
        ),
    ),
    "ipc": (
        Step(
            "transport",
            _script("checks.gpu_ipc", "--json", "{out}/ipc.json"),
            240,
            _script("checks.gpu_ipc", "--cpu", "--acquires", "40", "--json", "{out}/ipc.json"),
        ),
        Step(
            "memory in pieces",
            _script("checks.gpu_ipc", "--transport", "vmm", "--json", "{out}/vmm.json"),
            240,
        ),
    ),
    "prefill": (
        Step(
            "prefill and decode",
            _script("bench.prefill", "--limit-s", "330", "--json", "{out}/prefill.json"),
            460,
            _script("bench.prefill", "--cpu", "--json", "{out}/prefill.json"),
        ),
    ),
    "link": (
        Step("transport between GPUs", _script("checks.gpu_ipc", "--json", "{out}/ipc-link.json"), 240, None, gpus=2),
        Step(
            "engines on two GPUs",
            _script("checks.gpu_e2e", "--only", LINK_CASES, *THREE, "--json", "{out}/e2e-link.json"),
            300,
            None,
            gpus=2,
        ),
        Step(
            "prefill and decode over the link",
            _script("bench.prefill", "--limit-s", "330", "--json", "{out}/prefill-link.json"),
            460,
            None,
            gpus=2,
        ),
    ),
    "serve": (
        Step(
            "doctor",
            ("python", "-m", "vllm_dwdp.cli", "doctor"),
            200,
            ("python", "-m", "vllm_dwdp.cli", "doctor"),
            gpus=2,
        ),
        Step(
            "soak",
            _script("checks.soak", *SOAK, "--seconds", "300", "--within-s", "450", "--json", "{out}/soak.json"),
            460,
            _script("checks.soak", "--requests", "1000", "--json", "{out}/soak.json"),
            gpus=2,
        ),
        _loads("all layers", *WHOLE, "--systems", "dpep", HALF, "--loads", *STEADY),
        _loads("at fixed times", "--systems", "dpep", "replicas", HALF, "--loads", *TIMED),
        _loads("beside tensor parallelism", *WHOLE, "--systems", "tp", HALF, "--loads", *STEADY),
        # Replicas pull nothing: what is slower in DWDP's steps than in theirs, pulls make slower.
        _loads(
            "same tiles", "--tiles", "alike", "--profile", "--systems", "dpep", "replicas", HALF, "--loads", STEADY[0]
        ),
        _loads("FP8", "--model", "qwen3-fp8", "--systems", "dpep", "tp", HALF, "--loads", *STEADY),
        _loads("INT4", "--model", "qwen3-int4", "--systems", "dpep", "tp", PAGED, "--loads", *STEADY, *MARLIN),
        _loads("MXFP4", "--model", "gpt-oss-mxfp4", "--layers", "8", "--systems", "dpep", "tp", PAGED, *MXFP4),
        _loads("full replicas", "--systems", "dpep", "replicas", HALF, "--loads", *STEADY),
        _loads("gpt-oss", "--model", "gpt-oss", "--layers", "6", "--systems", "dpep", HALF, *LAYERS_AT_SIZE),
        _loads(
            "DeepSeek-V3",
            "--model",
            "deepseek-v3",
            "--layers",
            "4",
            "--batched-tokens",
            "8192",
            "--kv-gib",
            "2",
            "--systems",
            "dpep",
            HALF_OF_256,
            *LAYERS_AT_SIZE,
            *FEW_GRAPHS,
        ),
        _loads("launchers", "--systems", "dpep", *LAUNCHERS, "--loads", "mixed=8192/128/16", "decode8=512/128/8"),
        Step("starts", _script("bench.starts", "--limit-s", "300", "--json", "{out}/starts.json"), 460, None, gpus=2),
        Step("a rank returns", _script("bench.returns", "--plain", "--json", "{out}/returns.json"), 460, None, gpus=2),
        _loads("travel or read with most experts held", "--systems", "dpep", *HELD_112, "--loads", *DECODE),
        _travel("tokens that travel"),
        _travel("tokens that travel, gpt-oss", "--model", "gpt-oss-120b", limit_s=300),
        _travel("tokens that travel, DeepSeek-V3", "--model", "DeepSeek-V3", limit_s=300),
        _travel("tokens that travel, 112 held", "--held", "112", "--tokens", "1", "2", "4", "8", "32"),
        Step("at once", _script("bench.contention", "--json", "{out}/contention.json"), 100, None, gpus=2),
        Step("calls of a layer", _script("bench.layer_calls"), 60, _script("bench.layer_calls", "--simulated"), gpus=2),
    ),
    "four": (
        Step(
            "at once", _script("bench.contention", "--seconds", "0.3", "--json", "{out}/contention-4.json"), 200, gpus=4
        ),
        Step(
            "engines of four ranks",
            _script("checks.gpu_e2e", "--only", "four-", *FIVE, "--json", "{out}/e2e-4.json"),
            460,
            gpus=4,
        ),
        _loads("four", *SHORT, "--systems", "dpep", "tp", QUARTER, "--loads", *FOUR, gpus=4),
        _loads("four more", *SHORT, "--systems", "dpep", "tp", QUARTER, "--loads", *MORE_OF_FOUR, gpus=4),
        _loads("groups of two", *SHORT, "--systems", "dpep", "dptp", PAIRS, "--loads", *FOUR, gpus=4),
        _loads("disaggregated", *APART, "--systems", "dpep", "tp", HALF, *APART_LOADS, gpus=4),
        Step(
            "a rank of four returns",
            _script("bench.returns", "--ranks", "4", "--limit-s", "450", "--json", "{out}/returns-4.json"),
            470,
            gpus=4,
        ),
        Step("an extra rank", _script("bench.returns", *EXTRA, "--json", "{out}/returns-extra.json"), 470, gpus=4),
    ),
    "backends": (
        Step(
            "vLLM's other backends",
            _kernels("backends", "--limit-s", "120", "--tokens", "8192", "128", "--json", "{out}/backends.json"),
            150,
        ),
        Step("kernels on a composite range", _script("bench.composite", "--json", "{out}/composite.json"), 200),
    ),
    "sanitize": (
        Step("memcheck", _checked("memcheck"), 150, None, UNCACHED),
        Step("racecheck", _checked("racecheck", "half tiles", "swapped"), 150, None, UNCACHED),
        Step(
            "two ranks",
            (*_checker("memcheck"), "--target-processes", "all", *_script("checks.gpu_ipc", *PAIR)),
            150,
            None,
            UNCACHED,
        ),
    ),
}
