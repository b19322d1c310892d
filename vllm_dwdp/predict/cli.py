"""`vllm-dwdp`: plan, simulate, paper, calibrate, hardware, models."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from vllm_dwdp.errors import DwdpError, install
from vllm_dwdp.predict.arguments import build

_MOST_CHARACTERS = 1000


def main(argv: list[str] | None = None, more: Iterable[Callable[[Any], None]] = ()) -> int:
    """Returns the exit status: 0, 1 (a promise missed), 2 (bad input). more: as in `build`; each sets `run`."""
    args = build(more).parse_args(argv)
    try:
        status = int(args.run(args) if "run" in args else globals()[f"_{args.command}"](args))
        if sys.stdout is not None:  # `>&-`: nobody wants it
            sys.stdout.flush()
        return status
    except DwdpError as e:
        print(f"vllm-dwdp {args.command}: error: {one_line(str(e))}", file=sys.stderr)
        return 2
    except (
        ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError, ImportError
    ) as e:  # fmt: skip
        what = f"{type(e).__name__}: {e}".splitlines()[0]
        print(
            f"vllm-dwdp {args.command}: error: the input is not understood ({what}): check its types", file=sys.stderr
        )
        return 2
    except OSError as e:
        if e.filename is None:
            # Of the output, such as `| head`. Without this, Python complains once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            return 0
        line = f"{e.filename or 'the output'} cannot be used ({e.strerror}): check the path, permissions and free space"
        print(f"vllm-dwdp {args.command}: error: {one_line(line)}", file=sys.stderr)
        return 2


def one_line(text: str) -> str:
    """What a terminal shows as one line: values of a file may be long, and paths may have line breaks."""
    text = " ".join(text.split())
    return (
        text
        if len(text) <= _MOST_CHARACTERS
        else f"{text[: _MOST_CHARACTERS // 2]} ... {text[-_MOST_CHARACTERS // 2 :]}"
    )


def _plan(args: argparse.Namespace) -> int:
    from vllm_dwdp.predict.plan_report import plan_json, plan_text
    from vllm_dwdp.predict.plan_request import case_of
    from vllm_dwdp.predict.pools_report import pool_request, pools_json, pools_text

    _check_plot(args.plot)
    request = case_of(args)
    if (asked := pool_request(args, request.case)) is not None:
        print(json.dumps(pools_json(asked), indent=2) if args.json else pools_text(asked))
        return 0
    print(json.dumps(plan_json(request), indent=2) if args.json else plan_text(request))
    if args.plot:
        from vllm_dwdp.predict.plots import plot_plan

        _drawn(plot_plan(request.case, args.plot), args.json)
    return 0


def _simulate(args: argparse.Namespace) -> int:
    from vllm_dwdp.predict.sim.disaggregated import run_disaggregated
    from vllm_dwdp.predict.sim.report import pools_text, results_json, results_text
    from vllm_dwdp.predict.sim.run import run_scenario
    from vllm_dwdp.predict.sim.scenario import load_scenario

    _check_plot(args.plot)
    if args.plot and args.disaggregated:
        raise DwdpError(f"--plot {args.plot}: pools have no picture; leave it or --disaggregated out")
    scenario = load_scenario(args.scenario, args.seed, args.disaggregated)
    if args.disaggregated:
        pools = run_disaggregated(scenario, progress=sys.stderr.isatty())
        print(json.dumps(results_json(scenario, pools), indent=2) if args.json else pools_text(scenario, pools))
        return 0
    results = run_scenario(scenario, progress=sys.stderr.isatty())
    print(json.dumps(results_json(scenario, results), indent=2) if args.json else results_text(scenario, results))
    if args.plot:
        from vllm_dwdp.predict.sim.plots import plot_results

        _drawn(plot_results(scenario, results, args.plot), args.json)
    return 0


def _paper(args: argparse.Namespace) -> int:
    from vllm_dwdp.predict.fit import fit
    from vllm_dwdp.predict.fitted import FITTED
    from vllm_dwdp.predict.reproduce import report, rows

    constants = fit() if args.refit else FITTED
    text, unlisted = report(constants)
    if args.json:
        fields = ("table", "label", "published", "predicted", "kind", "limit", "deviation", "kept", "known")
        print(json.dumps([{f: getattr(row, f) for f in fields} for row in rows(constants)], indent=2))
    else:
        print(text)
    return 1 if unlisted else 0


def _calibrate(args: argparse.Namespace) -> int:
    from vllm_dwdp.predict.calibrate import calibrate

    text, summary = calibrate(args.measured, args.hardware)
    print(summary, file=sys.stderr)
    if args.output:
        try:
            with open(args.output, "w") as f:
                f.write(text)
        except OSError as e:
            raise DwdpError(f"--output {args.output} cannot be written ({e.strerror}): give another path") from None
    else:
        print(text)
    return 0


def _hardware(args: argparse.Namespace) -> int:
    from vllm_dwdp.predict.hardware_file import load_hardware, shipped
    from vllm_dwdp.predict.plan_report import hardware_text, table

    if args.name:
        print(hardware_text(load_hardware(args.name)))
        return 0
    lines: list[list[Any]] = [["name", "chip", "memory", "HBM TB/s", "BF16 PFLOP/s", "link GB/s", "ranks"]]
    for name in shipped():
        h = load_hardware(name)
        lines.append([
            name, h.name, f"{h.memory / 1e9:.0f} GB", f"{h.memory_bandwidth / 1e12:.2f}", f"{h.peak['bf16'] / 1e15:.2f}",
            f"{h.link_rate / 1e9:.0f}", h.max_ranks,
        ])  # fmt: skip
    print(table(lines))
    return 0


def _models(args: argparse.Namespace) -> int:
    from vllm_dwdp.predict.plan_report import table
    from vllm_dwdp.predict.read_config import MODELS, load_model

    lines: list[list[Any]] = [["name", "parameters", "active", "layers", "experts", "expert", "weights"]]
    for path in sorted(MODELS.glob("*.json")):
        m = load_model(path.stem)
        lines.append([
            path.stem, f"{m.total_params / 1e9:.1f} B", f"{m.active_params / 1e9:.1f} B", m.layers,
            f"{m.top_k} of {m.experts}", f"{m.expert_bytes / 1e6:.1f} MB", m.expert_format.name,
        ])  # fmt: skip
    print(table(lines))
    return 0


def _check_plot(path: str | None) -> None:
    """Refuse a picture that could not be drawn, before anything is computed for it."""
    if path is None:
        return
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise DwdpError(f"--plot {path}: {folder} is no folder that can be written to; give another path")
    if importlib.util.find_spec("matplotlib") is None:
        raise DwdpError(f"--plot needs matplotlib: {install('predict')}")


def _drawn(paths: list[str], quiet: bool) -> None:
    for path in paths:
        print(f"drawn: {path}", file=sys.stderr if quiet else sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
