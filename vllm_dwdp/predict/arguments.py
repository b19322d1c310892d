"""Arguments of `vllm-dwdp`, in the style of vLLM's command line: dashes or underscores, counts such as 32K, groups."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, get_args

from vllm_dwdp.config import AUTO, DecodeName, DwdpConfig
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.predict.formats import FORMATS, KV_BYTES
from vllm_dwdp.predict.memory_plan import UTILISATION
from vllm_dwdp.predict.units import parse_count


class Parser(argparse.ArgumentParser):
    """argparse with vLLM's habits: --tokens_per_step is --tokens-per-step, and errors are one line."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", _Help)
        super().__init__(**settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """With underscores in option names read as dashes."""
        given: Sequence[str] = sys.argv[1:] if args is None else args
        fixed = []
        for arg in given:
            name, equals, value = arg.partition("=")
            fixed.append(name.replace("_", "-") + equals + value if arg.startswith("--") else arg)
        return super().parse_known_args(fixed, namespace)

    def error(self, message: str) -> NoReturn:
        """One line and status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


#: Tokens of a step, of a prompt and of an answer: more than any engine takes.
MOST_STEP_TOKENS = 1 << 20
MOST_TOKENS = 1 << 30


def count(what: str, least: int = 1, most: int | None = None) -> Any:
    """An argparse type for whole numbers such as 32768, 32K or 32k, in least..most."""

    def read(text: str) -> int:
        try:
            value = parse_count(text, what, least)
            if most is not None and value > most:
                raise DwdpError(f"{what} is {text}: it must be at most {most}")
            return value
        except DwdpError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    return read


def share(text: str) -> int | str:
    """An argparse type for `experts_per_rank`: a whole number, or "auto"."""
    if text == AUTO:
        return AUTO
    try:
        return parse_count(text, "--experts-per-rank", 1)
    except DwdpError as e:
        raise argparse.ArgumentTypeError(f"{e}, or auto") from None


def number(what: str, low: float, high: float) -> Any:
    """An argparse type for numbers in low..high."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{what} is {text!r}: write a number without unit") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{what} is {text}: it must be in {low:g}..{high:g}")
        return value

    return read


def build(more: Iterable[Callable[[Any], None]] = ()) -> Parser:
    """The parser of `vllm-dwdp`. more: each adds a command of another package."""
    about = "Whether DWDP pays, and by how much, before you rent GPUs; and whether a machine is ready for it."
    parser = Parser(prog="vllm-dwdp", description=about)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    _plan(commands)
    sim = commands.add_parser("simulate", help="run fleets of ranks on a scenario", description="Simulate a scenario.")
    sim.add_argument("scenario", help="a TOML file (docs/predict.md describes it); examples/scenario.toml is one")
    sim.add_argument("--seed", type=count("--seed", 0), help="in place of the scenario's seed")
    sim.add_argument("--disaggregated", action="store_true", help="decode elsewhere, in the scenario's [decode_pool]")
    _output(sim)
    paper = commands.add_parser(
        "paper", help="print the reproduction table; fails if a promise is missed",
        description="What was published, what the planner says, and whether the promised tolerance is kept.",
    )  # fmt: skip
    paper.add_argument("--refit", action="store_true", help="fit the five constants afresh and use those")
    paper.add_argument("--json", action="store_true", help="print JSON")
    cal = commands.add_parser(
        "calibrate", help="fit a hardware file's efficiencies to measurements",
        description="Fit efficiencies to measured times or rates, and write a hardware file with them.",
    )  # fmt: skip
    cal.add_argument("measured", help="a JSON file with measurements (docs/predict.md, Calibration)")
    cal.add_argument("--hardware", required=True, help="the hardware file to start from")
    cal.add_argument("--output", metavar="FILE.toml", help="where to write the calibrated file (printed otherwise)")
    show = commands.add_parser("hardware", help="list hardware files, or show one with its sources")
    show.add_argument("name", nargs="?", help="a shipped name or a .toml file")
    commands.add_parser("models", help="list the shipped models with their parameters")
    for add in more:
        add(commands)
    return parser


def _output(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print JSON")
    out.add_argument("--plot", metavar="FILE.png", help="draw into files whose names start so (needs matplotlib)")


def _plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="does DWDP pay for this model on this hardware?",
        description="Memory of a rank, the window that hides pulls, gains over the other ways, and where they cross.",
    )  # fmt: skip
    plan.add_argument("model", help="a config.json, its folder, a shipped name, or an id in the Hugging Face cache")
    place = plan.add_argument_group("machine")
    place.add_argument("--hardware", default="h200", help="a shipped name or a .toml file")
    place.add_argument("--ranks", "--data-parallel-size", type=count("--ranks"), default=4, help="ranks of a group")
    place.add_argument("--gpu-memory-utilization", type=number("--gpu-memory-utilization", 0.01, 1.0), default=UTILISATION,
                       help="share of the memory that may be used")  # fmt: skip
    load = plan.add_argument_group("load")
    load.add_argument(
        "--isl", "--input-len", type=count("--isl", 1, MOST_TOKENS), default=8192, help="tokens of a prompt"
    )
    load.add_argument(
        "--osl", "--output-len", type=count("--osl", 1, MOST_TOKENS), default=1024, help="tokens of an answer"
    )
    load.add_argument("--tokens-per-step", "--max-num-batched-tokens", type=count("--tokens-per-step", 1, MOST_STEP_TOKENS),
                      default=8192, help="tokens of a rank's prefill step")  # fmt: skip
    load.add_argument("--length-ratio", type=number("--length-ratio", 0.001, 1.0), default=1.0,
                      help="prompts are uniform in [ratio * isl, isl]")  # fmt: skip
    load.add_argument(
        "--isl-std", type=number("--isl-std", 0, 1e9), default=0.0, help="normal lengths instead: their std"
    )
    load.add_argument("--prefix-cache-hits", type=number("--prefix-cache-hits", 0, 0.99), default=0.0,
                      help="share of a prompt found in the prefix cache")  # fmt: skip
    load.add_argument(
        "--decode-sequences", type=count("--decode-sequences", 1, 1 << 16), default=64, help="requests of a decode step"
    )
    load.add_argument(
        "--skew", type=number("--skew", 0, 10), default=0.0, help="Zipf exponent of the experts' popularity"
    )
    how = plan.add_argument_group("dwdp")
    how.add_argument("--experts-per-rank", type=share, help="experts of a layer on a rank, or auto (default: E/N)")
    how.add_argument("--num-slots", type=count("--num-slots", 2, 1024), default=2, help="prefetch buffers")
    how.add_argument(
        "--weight-view", choices=("split", "contiguous"), default="split", help="how kernels see the experts"
    )
    how.add_argument(
        "--cached-experts", type=count("--cached-experts", 0), default=0, help="hot experts kept for decode"
    )
    how.add_argument("--decode", choices=get_args(DecodeName), default=DwdpConfig().decode,
                     help="how steps of few tokens get at missing experts")  # fmt: skip
    how.add_argument("--travel-tokens", type=count("--travel-tokens", 1, MOST_STEP_TOKENS),
                     default=DwdpConfig().travel_tokens, help="most tokens of a step whose tokens travel")  # fmt: skip
    apart = plan.add_argument_group("disaggregated", "some GPUs compute prompts, others decode")
    apart.add_argument(
        "--disaggregated", action="store_true", help="how many GPUs of each a load needs (DWDP, DEP prefill)"
    )
    apart.add_argument("--rate", type=number("--rate", 1e-6, 1e6), help="requests per second, of all users together")
    apart.add_argument("--ttft", metavar="TIME", help="mean time to the first token at most (default: 2 s)")
    apart.add_argument("--tokens-per-user", type=number("--tokens-per-user", 0.01, 1e5),
                       help="tokens per second of each user at least (default: 20)")  # fmt: skip
    apart.add_argument("--transfer-rate", metavar="RATE", help="of a GPU's KV cache to decode (default: 50 GB/s)")
    kinds = plan.add_argument_group("formats")
    kinds.add_argument("--expert-format", choices=sorted(FORMATS), help="of the routed experts (default: the config's)")
    kinds.add_argument("--linear-format", choices=sorted(FORMATS), help="of all other products (default: the config's)")
    kinds.add_argument("--kv-cache-dtype", choices=sorted(KV_BYTES), default="auto", help="of the KV cache")
    _output(plan)
