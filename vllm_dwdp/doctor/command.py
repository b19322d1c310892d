"""`vllm-dwdp doctor [MODEL [--ranks N]] [--json]`."""

from __future__ import annotations

import argparse
from typing import Any

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.arguments import count


def add(commands: Any) -> None:
    """Put the command into the parser of `vllm-dwdp`."""
    doctor = commands.add_parser(
        "doctor", help="say whether this machine has what ranks need, and what to do where not",
        description="A line for everything that ranks need: ok, warning or failure, with a remedy. Ends with 1 where "
        "something failed.",
    )  # fmt: skip
    doctor.add_argument("model", nargs="?", help="also say whether it fits: a model as `vllm-dwdp plan` takes it")
    doctor.add_argument(
        "--ranks", "--data-parallel-size", type=count("--ranks"), help="of the model (default: as many as GPUs)"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0, or 1 where something failed. Raises DwdpError for a model that cannot be read."""
    from vllm_dwdp.doctor.examine import examine
    from vllm_dwdp.doctor.line import as_json, exit_status, shown
    from vllm_dwdp.predict.read_config import load_model

    if args.model is None and args.ranks is not None:
        raise DwdpError("--ranks says for how many a model is planned: name a model")
    if args.model is not None:
        load_model(args.model)
    try:
        lines = examine(args.model, args.ranks)
    except KeyboardInterrupt:
        return 130
    print(as_json(lines) if args.json else shown(lines))
    return exit_status(lines)
