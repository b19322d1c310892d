"""One prefill step under each way to run a model on N accelerators: DWDP, DEP, tensor parallel, plain data parallel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.contention import exposed
from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.roofline import Local, local_time
from vllm_dwdp.predict.work import Work

_ROUNDS = 12


@dataclass(frozen=True)
class Step:
    """Mean seconds of a step of one rank, by row of the paper's T1. `tokens`: of that rank (of the group for TP).

    pull: time copies run, off the path. exposed: the part of it that compute waits for. window: seconds per MoE layer
    that can hide a pull; pull_layer: seconds of one layer's pull.
    """

    way: str
    ranks: int
    tokens: float
    attention: float
    grouped: float
    dense: float
    others: float
    communication: float = 0.0
    synchronisation: float = 0.0
    merge: float = 0.0
    exposed: float = 0.0
    pull: float = 0.0
    window: float = 0.0
    pull_layer: float = 0.0

    @property
    def compute(self) -> float:
        """Seconds of local work."""
        return self.attention + self.grouped + self.dense + self.others

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.communication + self.synchronisation + self.merge + self.exposed

    @property
    def waiting(self) -> float:
        """Share of the time in which compute waits for pulls."""
        return self.exposed / self.seconds

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens per second and accelerator."""
        share = self.ranks if self.way == "TP" else 1
        return self.tokens / self.seconds / share


@dataclass(frozen=True)
class Options:
    """Choices that the model of a step depends on.

    kv_element: bytes of a value in the KV cache. attention_compute: type of the attention core's products.
    """

    kv_element: float = 2.0
    attention_compute: str = "bf16"


PLAIN: Final = Options()


def balanced_share(experts: int, ranks: int) -> int:
    """Experts per rank of a partition, rounded up."""
    return -(-experts // ranks)


def pull_bytes(model: MoeModel, ranks: int, share: int | None = None) -> float:
    """Bytes that a rank pulls for one MoE layer."""
    held = balanced_share(model.experts, ranks) if share is None else share
    if not balanced_share(model.experts, ranks) <= held <= model.experts:
        raise DwdpError(
            f"{held} experts per rank on {ranks} ranks: a rank of {model.name} ({model.experts} experts) holds "
            f"{balanced_share(model.experts, ranks)}..{model.experts}"
        )
    return (model.experts - held) * model.expert_bytes


def _means(local: Local) -> dict[str, float]:
    return {key: float(np.mean(getattr(local, key))) for key in ("attention", "grouped", "dense", "others")}


def dwdp(
    model: MoeModel,
    hardware: Hardware,
    work: Work,
    ranks: int,
    share: int | None = None,
    *,
    sliced: bool = False,
    merge: bool = False,
    copies_s: float | None = None,
    options: Options = PLAIN,
) -> Step:
    """DWDP on a group of `ranks` with `share` experts each (None: a partition).

    sliced: as the paper has slices, which let no pulls meet. merge: the own share is copied into the slot too
    (contiguous view). copies_s: of all copies of the step, where they were measured. Pulls run on from one forward into the
    next, so only pulls longer than their window are exposed.
    """
    check_group(hardware, ranks)
    local = _means(local_time(model, hardware, work, **vars(options)))
    layers = model.moe_layers
    pulled = pull_bytes(model, ranks, share)
    held = model.experts - pulled / model.expert_bytes
    alone = pulled / hardware.pull_rate(ranks) + (hardware.link_latency if pulled else 0.0)
    if copies_s is not None:
        alone = copies_s / layers
    # Every rank is read as fast as it reads: its memory serves both directions.
    traffic = 2 * hardware.pull_rate(ranks) / (hardware.memory_bandwidth * hardware.efficiency.memory)
    congested = 1 / (1 - min(traffic, 0.9))
    merge_seconds = 2 * held * model.expert_bytes * layers * congested if merge else 0.0
    merge_seconds /= hardware.memory_bandwidth * hardware.efficiency.memory

    # Copies slow compute, compute hides copies: a fixed point, reached within a few rounds.
    duty, rows, pull, waits, window = 0.5, local, alone, 0.0, 0.0
    for _ in range(_ROUNDS):
        reach = min(1.0, duty / hardware.slowdown_duty) if pulled else 0.0
        power = 1 + (hardware.attention_slowdown - 1) * reach
        warm = 1 + (hardware.matmul_slowdown - 1) * reach
        moved = 1 + (congested - 1) * duty if pulled else 1.0
        rows = {
            "attention": local["attention"] * power,
            "grouped": local["grouped"] * warm,
            "dense": local["dense"] * warm,
            "others": local["others"] * moved,
        }
        window = (sum(rows.values()) + merge_seconds) / layers
        pull, waits = exposed_pull(hardware, alone, window, ranks, duty, sliced)
        duty = (duty + min(1.0, pull / (window + waits))) / 2
    return Step(
        "DWDP", ranks, float(np.mean(work.tokens)), **rows, merge=merge_seconds, exposed=waits * layers,
        pull=pull * layers, window=window, pull_layer=pull,
    )  # fmt: skip


def exposed_pull(
    hardware: Hardware, alone: float, window: float, ranks: int, duty: float, sliced: bool = False
) -> tuple[float, float]:
    """`contention.exposed`, with what is known of `hardware`; alone: seconds of a pull while nobody else pulls."""
    apart = sliced or hardware.topology == "mesh"
    return exposed(alone, window, ranks, duty, apart, hardware.at_once.get(ranks))


def rate_at_once(hardware: Hardware, ranks: int) -> float:
    """Rate of a rank while all of `ranks` pull all the time, over its rate alone."""
    return 1 / exposed_pull(hardware, 1.0, 0.0, ranks, 1.0)[0]


def remote_copies(ranks: int, top_k: int) -> float:
    """Copies of a token that leave its rank, per direction, in DEP.

    Up to top_k ranks every rank is likely to hold one of a token's experts, and engines gather all tokens everywhere;
    beyond, a token goes once to each rank that holds one of its experts.
    """
    if ranks <= top_k:
        return ranks - 1.0
    return (ranks - 1) * (1 - (1 - 1 / ranks) ** top_k)


def dispatch_element(model: MoeModel) -> float:
    """Bytes of a hidden value on its way to the experts: as the experts' products take it. It returns in BF16."""
    return {"fp4": 0.5625, "fp8": 1.0}.get(model.expert_format.compute, 2.0)


def dep(model: MoeModel, hardware: Hardware, work: Work, ranks: int, *, options: Options = PLAIN) -> Step:
    """Data-parallel attention with expert parallelism: two collectives per MoE layer, and ranks wait for the slowest."""
    check_group(hardware, ranks)
    samples = local_time(model, hardware, work, resident=model.experts / ranks, **vars(options))
    local = _means(samples)
    compute = float(np.mean(samples.total))
    tokens = float(np.mean(work.tokens))
    moved = tokens * remote_copies(ranks, model.top_k) * model.hidden * (dispatch_element(model) + 2.0)
    collectives = model.moe_layers * (moved / hardware.pull_rate(ranks) + 2 * hardware.link_latency)
    spread = math.hypot(hardware.efficiency.imbalance, float(np.std(samples.total)) / compute)
    return Step(
        "DEP", ranks, tokens, **local, communication=collectives,
        synchronisation=expected_maximum(ranks) * spread * compute,
    )  # fmt: skip


def tensor_parallel(model: MoeModel, hardware: Hardware, work: Work, ranks: int, *, options: Options = PLAIN) -> Step:
    """One engine over `ranks` accelerators: every product split, two all-reduces of the hidden state per layer."""
    check_group(hardware, ranks)
    local = _means(local_time(model, hardware, work, split=ranks, **vars(options)))
    tokens = float(np.mean(work.tokens))
    reduced = 2 * (ranks - 1) / ranks * tokens * model.hidden * 2.0
    each = reduced / hardware.pull_rate(ranks) + 2 * hardware.link_latency
    return Step("TP", ranks, tokens, **local, communication=2 * model.layers * each)


def data_parallel(model: MoeModel, hardware: Hardware, work: Work, *, options: Options = PLAIN) -> Step:
    """A full replica on every accelerator: nothing shared, nothing waited for."""
    local = _means(local_time(model, hardware, work, **vars(options)))
    return Step("DP", 1, float(np.mean(work.tokens)), **local)


def check_group(hardware: Hardware, ranks: int) -> None:
    """Raise DwdpError unless one link domain of `hardware` holds a group of `ranks`."""
    if not 2 <= ranks <= hardware.max_ranks:
        raise DwdpError(f"a group of {ranks} ranks on {hardware.name}: its link joins 2..{hardware.max_ranks}")


@lru_cache(maxsize=256)
def expected_maximum(ranks: int) -> float:
    """Mean of the largest of `ranks` standard normal numbers: 0.564 for 2, 1.029 for 4, 1.424 for 8."""
    x = np.linspace(-9, 9, 20001)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    below = np.cumsum(density) * (x[1] - x[0])
    weight: Any = ranks * np.clip(below, 0, 1) ** (ranks - 1) * density
    return float(np.sum(x * weight) / np.sum(weight))
