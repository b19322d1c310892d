"""What a rank's memory holds under DWDP, and which groups fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hold import MemoryFacts, SlotsHold
from vllm_dwdp.predict.hardware_file import Hardware
from vllm_dwdp.predict.model import MoeModel
from vllm_dwdp.predict.strategies import balanced_share, pull_bytes

#: vLLM's --gpu-memory-utilization.
UTILISATION: Final = 0.92
#: Runtime, kernels and graphs, bytes.
RUNTIME: Final = 2.5e9
VIEWS: Final = ("split", "contiguous")
#: By view, which experts of a layer a slot holds.
SLOTS_HOLD: Final[dict[str, SlotsHold]] = {"split": "missing", "contiguous": "all", "inplace": "nothing"}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank. `kv`: what remains for the KV cache (negative: does not fit); `kv_tokens` of it in tokens."""

    ranks: int
    share_experts: int
    replicated: float
    share: float
    slots: float
    scales: float
    working: float
    limit: float
    kv_bytes_per_token: float

    @property
    def used(self) -> float:
        """All but the KV cache."""
        return self.replicated + self.share + self.slots + self.scales + self.working

    @property
    def kv(self) -> float:
        """Left for the KV cache."""
        return self.limit - self.used

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit into the KV cache."""
        return max(0, int(self.kv / self.kv_bytes_per_token))


def working_bytes(model: MoeModel, tokens: int) -> float:
    """All but weights and KV cache: activations, runtime, kernels and graphs."""
    return RUNTIME + activation_bytes(model, tokens)


def activation_bytes(model: MoeModel, tokens: int) -> float:
    """Activations of a step: hidden states, and the routed experts' inputs and outputs, chunked as vLLM does at 32K."""
    rows = min(tokens, 32768)
    width = model.expert_params / (3 * model.hidden)
    hidden = 8 * tokens * model.hidden * 2.0
    experts = rows * model.top_k * (model.hidden + 3 * width) * 2.0
    return hidden + experts


def memory_plan(
    model: MoeModel,
    hardware: Hardware,
    ranks: int,
    share: int | None = None,
    *,
    view: str = "split",
    num_slots: int = 2,
    replicate_scales: bool = False,
    tokens: int = 8192,
    kv_element: float = 2.0,
    context: int = 8192,
    utilisation: float = UTILISATION,
) -> MemoryPlan:
    """DWDP on `ranks` ranks (1: a full replica). `view` split: slots hold the missing experts; contiguous: all E.

    replicate_scales: the scales of all experts stay on every rank and are not pulled. `context`: tokens of a sequence,
    for windows of attention. Raises DwdpError on impossible settings, not on too little memory (see `kv`).
    """
    if view not in VIEWS:
        raise DwdpError(f"the weight view is {view!r}: it must be one of {', '.join(VIEWS)}")
    if not 0 < utilisation <= 1:
        raise DwdpError(f"the share of memory to use is {utilisation}: it must be above 0 and at most 1")
    if num_slots < 2:
        raise DwdpError(f"num_slots is {num_slots}: it must be at least 2")
    held, slots, scales = model.experts, 0.0, 0.0
    if ranks > 1:
        held = balanced_share(model.experts, ranks) if share is None else share
        missing = pull_bytes(model, ranks, held)
        slots = num_slots * (missing if view == "split" else model.experts * model.expert_bytes)
        if replicate_scales:
            scales = (model.experts - held) * model.expert_params * model.expert_format.scales * model.moe_layers
            slots *= model.expert_format.data / model.expert_format.bytes
    return MemoryPlan(
        ranks=ranks,
        share_experts=held,
        replicated=model.replicated_bytes,
        share=held * model.expert_bytes * model.moe_layers,
        slots=slots,
        scales=scales,
        working=working_bytes(model, tokens),
        limit=hardware.memory * utilisation,
        kv_bytes_per_token=model.kv_bytes(context, kv_element) / context,
    )


def memory_facts(
    model: MoeModel,
    ranks: int,
    *,
    limit: float,
    dense: float,
    peak: float,
    view: str,
    num_slots: int,
    tokens: int,
    context: int,
    kv_element: float,
    kv_asked: float | None = None,
) -> MemoryFacts:
    """What `hold.choose` has to know. `tokens`: of a step, by which vLLM's KV cache exceeds the windows of attention;
    `context`: of the longest request; `kv_asked`: bytes of KV cache, where they are given."""
    request = sum(
        g.count * g.attention.kv_elements() * min(context, (g.attention.window or context) + tokens)
        for g in model.groups
    )
    return MemoryFacts(
        experts=model.experts,
        ranks=ranks,
        layers=model.moe_layers,
        limit=limit,
        dense=dense,
        peak=peak,
        expert=model.expert_bytes * model.moe_layers,
        slot_expert=model.expert_bytes * min(num_slots, model.moe_layers),
        slots_hold=SLOTS_HOLD[view],
        kv_token=model.kv_bytes(context, kv_element) / context,
        kv_request=request * kv_element,
        kv_asked=kv_asked,
    )


def smallest_group(plans: list[MemoryPlan], least_kv_tokens: int) -> MemoryPlan | None:
    """The plan with the fewest ranks (1: a full replica) that keeps that many tokens of KV cache; None: none does."""
    fitting = [plan for plan in plans if plan.kv_tokens >= least_kv_tokens]
    return min(fitting, key=lambda plan: (plan.ranks, plan.share_experts), default=None)


def largest_kv(plans: list[MemoryPlan]) -> MemoryPlan:
    """The plan with the largest KV cache."""
    return max(plans, key=lambda plan: plan.kv)
