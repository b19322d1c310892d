"""The command `vllm-dwdp`: the planner's commands and the doctor's."""

from __future__ import annotations

from vllm_dwdp.doctor import command
from vllm_dwdp.predict import cli


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 (something failed, a promise missed), 2 (bad input)."""
    return cli.main(argv, [command.add])
