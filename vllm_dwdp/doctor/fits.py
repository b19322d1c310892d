"""What fits on the GPUs that are there: the headline of `vllm-dwdp plan`, as a line."""

from __future__ import annotations

from vllm_dwdp.doctor.line import Line, failure, ok, warning
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.arguments import build
from vllm_dwdp.predict.hardware_file import shipped
from vllm_dwdp.predict.plan_report import headline, held_by_auto
from vllm_dwdp.predict.plan_request import case_of
from vllm_dwdp.predict.read_config import load_model
from vllm_dwdp.predict.startup import hardware_of
from vllm_dwdp.predict.verdict import judge


def planned(model: str, ranks: int, device: str | None) -> Line:
    """device: a GPU's name; None where there is none. Nothing that the planner refuses is an error here."""
    hardware = None if device is None else hardware_of(device)
    if hardware is None:
        text = "there is no GPU to plan for" if device is None else f"there is no hardware file for {device}"
        remedy = (
            f"vllm-dwdp plan {model} --ranks {ranks} --hardware NAME plans for another one ({', '.join(shipped())})"
        )
        return warning("plan", text, remedy)
    try:
        args = build().parse_args(["plan", model, "--hardware", hardware, "--ranks", str(ranks)])
        if limit := load_model(model).context_limit:
            args.isl, args.osl = min(args.isl, limit // 2), min(args.osl, limit // 2)
        request = case_of(args)
        verdict, held = judge(request.case), held_by_auto(request.case)
    except DwdpError as error:
        what, _, remedy = str(error).partition(": ")
        return warning("plan", what, remedy or "vllm-dwdp plan says more")
    text = headline(request.case, verdict).rstrip(".")
    if held is not None:
        text += f"; experts_per_rank auto would hold {held.share} of {request.case.model.experts} experts"
    if not verdict.gain:
        return failure("plan", text, verdict.knob)
    if verdict.answer in ("use it", "marginal"):
        return ok("plan", text)
    return warning("plan", text, f"{verdict.knob}; vllm-dwdp plan says more")
