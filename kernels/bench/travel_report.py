"""Compiles the kernels of travel.py without a GPU: `python -m vllm_dwdp.kernels.bench.travel_report`, one row for each.

Fails where one spills, or lacks an instruction by which it is ordered with other devices and the host: without it results
would be right until they are not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import travel
from .compile_report import spills

_SHAPE = {"E": 128, "HIDDEN": 2048, "ME": 0, "RANKS": 4, "BLOCK_H": 1024, "INTERPRETED": False}
_ASK = {"TOP_K": 8, "IDS_AT": 256, "WEIGHTS_AT": 8448, "SCALES_AT": 16640, "TOKENS_AT": 33024, "BLOCK_K": 8}


class Case(NamedTuple):
    """types: of the arguments that are no constants. ordered: instructions that must be there."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    ordered: tuple[str, ...] = ()
    warps: int = 4


def _ask(name: str, tokens: str, groups: int) -> Case:
    pointers = {"tokens": tokens, "scales": "fp32", "ids": "i32", "weights": "fp32", "owners": "i32", "own_ids": "i32",
                "state": "i32", "mails": "i64", "bells": "i64"}  # fmt: skip
    numbers = ("num_tokens", "stride_t", "stride_st", "stride_sg", "room", "bucket", "layer")
    types = {f"{key}_ptr": f"*{kind}" for key, kind in pointers.items()} | dict.fromkeys(numbers, "i32")
    ordered = ("sys.acq_rel", "fence.acq_rel.sys", "st.relaxed.sys")
    return Case(name, travel.ask_kernel, types, {**_ASK, "GROUPS": groups, "BLOCK_G": 16}, ordered)


CASES = (
    _ask("ask", "bf16", 0),
    _ask("ask fp8", "fp8e4nv", 16),
    Case(
        "wait", travel.wait_kernel,
        {**dict.fromkeys(("ids_ptr", "owners_ptr", "late_ids_ptr", "state_ptr", "flags_ptr"), "*i32"),
         "limits_ptr": "*i64", "num_routes": "i32", "bucket": "i32"},
        {"FIRST": travel.FIRST_SKIP, "MOST": travel.MOST_SKIP, "BLOCK": 512}, ("sys.acquire", "globaltimer"), 1,
    ),
    Case(
        "merge", travel.merge_kernel,
        {"ids_ptr": "*i32", "owners_ptr": "*i32", "state_ptr": "*i32", "answers_ptr": "*i64", "out_ptr": "*bf16",
         "stride_o": "i32"}, {},
    ),
    Case(
        "take", travel.take_kernel,
        {"mail_ptr": "*i32", **dict.fromkeys(("sources_ptr", "targets_ptr", "words_ptr"), "*i64"), "count": "i32"},
        {"BLOCK": 4096},
    ),
    Case("answer", travel.answer_kernel, {"mail_ptr": "*i32", "flag_ptr": "*i32"}, {}, ("sys.release",)),
)  # fmt: skip


def compiled(case: Case, arch: int) -> dict[str, Any]:
    """What the compiler made of a case; `problem` is empty where all is well."""
    names = case.kernel.arg_names
    known = {**_SHAPE, **case.constants}
    constants = {(at,): known[name] for at, name in enumerate(names) if name not in case.types}
    signature = {name: case.types.get(name, "constexpr") for name in names}
    source = ASTSource(case.kernel, signature=signature, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.warps}).asm["ptx"]
    registers, spilled = spills(ptx, arch)
    missing = [what for what in case.ordered if what not in ptx]
    problem = f"lacks {', '.join(missing)}" if missing else "spills" if spilled else ""
    return {"name": case.name, "arch": arch, "registers": registers, "spilled": spilled, "problem": problem}


def main() -> int:
    """Command line; 1 where there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=[90, 100])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [compiled(case, arch) for case in CASES for arch in args.arch]
    for row in rows:
        print(f"{row['name']:<8} sm_{row['arch']:<4} {row['registers']:>4} registers, {row['spilled']} bytes spilled"
              f"{'  PROBLEM: ' + row['problem'] if row['problem'] else ''}")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1))
    return int(any(row["problem"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
