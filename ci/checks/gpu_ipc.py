#!/usr/bin/env python3
"""Checks the CUDA transport and copy engine on real GPUs, one is enough, and measures them. Needs no vLLM.

With two GPUs or more, owners lie on the second one, so that rates are those of the link between them.

    python -m ci.checks.gpu_ipc                      all parts, under 4 minutes; table on stdout, JSON beside it
    python -m ci.checks.gpu_ipc --only ranks,exposed
    python -m ci.checks.gpu_ipc --transport vmm      of that transport instead of cupy_ipc, composed ranges, adopted slabs
    python -m ci.checks.gpu_ipc --cpu                the parts with processes over shared memory, on any machine

Every part runs in a process of its own and has a limit of time, so that one failure hides no other. Exit code 1: some
part failed, or a value is off.
"""

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import distributions
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ci.bench.rates import MIB, Layer, Row, exposed, launch_times, merge, overlap, rates, same_bytes
from ci.checks.gpu_adopt import adopted_part
from ci.checks.gpu_compose import compose_part
from ci.checks.gpu_group import Group
from ci.checks.gpu_mapped import Mapped, TorchCompute
from ci.checks.gpu_ranks import LAYERS, Setting, transport_on
from ci.checks.visible import visible_gpus
from ci.root import ROOT
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.transport.cuda_bindings import BindingsVmm
from vllm_dwdp.transport.cuda_copy import CopyOptions
from vllm_dwdp.transport.cuda_cupy import CupyDevice

KIB = 1024
SIZES = [64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB]


def ranks_part(settings: list[Setting], order: str, acquires: int) -> list[Row]:
    """Byte equality over the acquires of every rank."""
    rows = []
    for setting in settings:
        name = f"{setting.transport}, {setting.num_ranks} ranks"
        group = Group(setting)
        try:
            begin = time.perf_counter()
            played = group.play(order, acquires)
            took = time.perf_counter() - begin
            group.close()
        finally:
            group.abandon()
        wrong, acquired = sum(one.wrong for one in played.values()), sum(one.acquired for one in played.values())
        note = f"{acquired} acquires in {took:.1f} s"
        # Of direct forwards none is acquired.
        enough = acquired >= (acquires if order == "play" else 3 * LAYERS)
        rows.append(Row(order, f"{name}: wrong bytes", wrong, "bytes", wrong == 0 and enough, note))
    return rows


def ended_part(transport: str, how: str, order: str) -> list[Row]:
    """An owner that is killed, or that leaves in order while others read: they go on, with the right bytes."""
    group = Group(Setting(transport, 3))
    try:
        group.play(order, 200)
        if how == "killed":
            group.kill(0)
        else:
            group.play_while_one_leaves(order, 2000, 0)
        group.play("churn", 2048 if transport != "shm" else 1)
        played = group.play(order, 300)
        group.close()
    finally:
        group.abandon()
    wrong = sum(one.wrong for one in played.values())
    return [Row(how, f"{transport}, {order}: wrong bytes after the owner's end", wrong, "bytes", wrong == 0)]


def both_ways(transport: str, how: str) -> list[Row]:
    """`ended_part` of readers that pull, and of ones that read directly."""
    return [*ended_part(transport, how, "play"), *ended_part(transport, how, "direct")]


def refuse(device: CupyDevice, name: str) -> tuple[list[str], bool]:
    """(what was said to calls that must fail, whether a slab is zeroed and seen by torch without a copy)."""
    transport = transport_on(device, name, CopyOptions())
    slab = transport.allocate_slab(64 * MIB)
    calls: tuple[Callable[[], object], ...] = (
        lambda: transport.map_peer(transport.export_handle(slab)),
        lambda: transport.allocate_slab(device.memory().total),
        *strangers(device, name),
    )
    texts = []
    for call in calls:
        try:
            call()
            texts.append("")
        except DwdpError as error:
            texts.append(str(error))
    right = not bool(slab.tensor().any()) and slab.tensor().data_ptr() == slab.address
    transport.close()
    import torch

    torch.cuda.empty_cache()
    return texts, right


def strangers(device: CupyDevice, name: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Calls with a handle, and with an address, of nobody."""
    if name != "vmm":
        return lambda: device.ipc_open(b"\1" * 64), lambda: device.free(12345)
    vmm, page = BindingsVmm(device.index), BindingsVmm(device.index).granularity()
    return lambda: vmm.import_descriptor(sys.stdout.fileno()), lambda: vmm.unmap(page, page)


def refusals_part(name: str) -> list[Row]:
    """What CUDA itself must refuse, in our words; and that nothing is left behind."""
    device = CupyDevice(0)
    refuse(device, name)  # the first time, CUDA and torch take memory for themselves
    before = device.memory().free
    texts, right = refuse(device, name)
    lost = before - device.memory().free
    return [
        Row("refusals", "the same process", 0, "", "very process" in texts[0], texts[0]),
        Row("refusals", "too little memory", 0, "", "GiB free" in texts[1], texts[1]),
        Row("refusals", "a handle of nobody", 0, "", "(cudaError" in texts[2] or "(CUDA_ERROR" in texts[2], texts[2]),
        Row("refusals", "an address of nobody", 0, "", "(cudaError" in texts[3] or "(CUDA_ERROR" in texts[3], texts[3]),
        Row("refusals", "a slab is zeroed, and torch sees it without a copy", 0, "", right),
        Row("refusals", "memory not given back", lost / MIB, "MiB", lost <= 0),
    ]


def rate_part(kind: str, nbytes: int) -> list[Row]:
    with Mapped(kind, nbytes) as peer:
        slot = peer.transport.allocate_slot(nbytes)
        rows = rates(peer.device, kind, peer.source, slot, SIZES)
        return rows + [same_bytes(peer.device, peer.source, slot)]


def launch_part(name: str) -> list[Row]:
    layer = Layer()
    with Mapped(name, layer.share_bytes) as peer:
        return launch_times(peer.device, peer.transport, peer.source, layer, [MIB, 4 * MIB, 16 * MIB])


def merge_part(name: str) -> list[Row]:
    layer = Layer()
    with Mapped(name, layer.share_bytes) as peer:
        return merge(peer.device, peer.transport, peer.source, layer, layer.experts // layer.ranks, None)


def overlap_part(kind: str, nbytes: int) -> list[Row]:
    with Mapped(kind, nbytes) as peer:
        slot = peer.transport.allocate_slot(nbytes)
        return overlap(peer.device, TorchCompute(peer.device), peer.source, slot, SIZES[1:5])


def exposed_part() -> list[Row]:
    with Mapped("cuda_pinned", MIB) as peer:
        slot = peer.transport.allocate_slot(MIB)
        return exposed(peer.device, TorchCompute(peer.device), peer.source, slot, [5e-4, 2e-3, 1e-2])


def parts(transport: str, acquires: int) -> dict[str, Callable[[], list[Row]]]:
    """By name, in the order of their worth. transport: shm without a GPU."""
    if transport == "shm":
        return {
            "ranks": lambda: ranks_part([Setting("shm", 2)], "play", acquires),
            "killed": lambda: ended_part("shm", "killed", "play"),
            "left": lambda: ended_part("shm", "left", "direct"),
            "adopted": lambda: adopted_part("shm"),
            # Without graphs: there are none here.
            "direct": lambda: ranks_part([Setting("shm", 2)], "direct", acquires),
        }
    two, three, four = (Setting(transport, ranks) for ranks in (2, 3, 4))
    own = {"compose": compose_part, "adopted": lambda: adopted_part("vmm")} if transport == "vmm" else {}
    return {
        "refusals": lambda: refusals_part(transport),
        "ranks": lambda: ranks_part([two, three, four, Setting("cuda_pinned", 2)], "play", acquires),
        **own,
        "killed": lambda: both_ways(transport, "killed"),
        "left": lambda: both_ways(transport, "left"),
        "exposed": exposed_part,
        "direct": lambda: ranks_part([two, four], "direct", acquires),
        "launch": lambda: launch_part(transport),
        "merge": lambda: merge_part(transport),
        "overlap": lambda: overlap_part("cuda_pinned", 256 * MIB),
        "rate-pinned": lambda: rate_part("cuda_pinned", 128 * MIB),
        "rate-ipc": lambda: rate_part(transport, 1024 * MIB),
        # From another GPU: copies from the own one queue behind compute and show nothing.
        "overlap-link": lambda: overlap_part(transport, 1024 * MIB),
        # For a checker of device memory, under which the others take too long.
        "pair": lambda: ranks_part([two], "play", acquires),
    }


def run_part(pipe: Connection, name: str, transport: str, acquires: int) -> None:
    """In a process of its own: sends the rows of one part, one that failed if it raised."""
    try:
        rows = parts(transport, acquires)[name]()
    except BaseException as error:
        traceback.print_exc()
        rows = [Row(name, "failed", 0, "", False, f"{type(error).__name__}: {error}".splitlines()[0])]
    pipe.send(rows)


def attempt(name: str, transport: str, acquires: int, limit_s: float) -> list[Row]:
    """The rows of one part, whatever becomes of its process."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=run_part, args=(theirs, name, transport, acquires))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            return [Row(name, "failed", 0, "", False, f"no result after {limit_s:.0f} s")]
        rows: list[Row] = ours.recv()
        return rows
    except EOFError:
        process.join(10)
        return [Row(name, "failed", 0, "", False, f"its process ended with code {process.exitcode}")]
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def show(row: Row) -> str:
    verdict = {None: "", True: "ok", False: "FAILED"}[row.ok]
    return f"{row.part:9} {row.name:52} {row.value:12.3f} {row.unit:6} {verdict:6} {row.note}".rstrip()


def about(cpu: bool) -> dict[str, Any]:
    """What it ran on; asked without touching a device in this process."""
    import platform

    import torch

    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if not cpu:
        versions["gpus"] = visible_gpus()
        versions["cupy"] = " ".join(
            f"{item.name} {item.version}" for item in distributions() if item.name.startswith("cupy")
        )
    return versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--transport", default="cupy_ipc", choices=("cupy_ipc", "vmm"), help="(%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="only the parts that need no GPU, over shared memory")
    parser.add_argument("--acquires", type=int, default=1000, help="per rank (%(default)s)")
    parser.add_argument("--limit", type=float, default=230.0, help="seconds for everything (%(default)s)")
    parser.add_argument("--json", type=Path, default=ROOT / ".cache" / "gpu_ipc_check.json")
    arguments = parser.parse_args()
    gpus = 0 if arguments.cpu else visible_gpus()
    transport = "shm" if arguments.cpu else arguments.transport
    known = list(parts(transport, arguments.acquires))
    # Without a GPU tests look at the same: tests/unit/test_positions.py.
    others = {"adopted"} if arguments.cpu else {"pair"} if gpus > 1 else {"pair", "overlap-link"}
    names = arguments.only.split(",") if arguments.only else [name for name in known if name not in others]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(known)}")
    begin, found, rows = time.monotonic(), about(arguments.cpu), []
    for name in names:
        left, started = arguments.limit - (time.monotonic() - begin), time.monotonic()
        if left < 5:
            new = [Row(name, "not run", 0, "", False, f"the {arguments.limit:.0f} s were over")]
        else:
            new = attempt(name, transport, arguments.acquires, left)
        new.append(Row(name, "took", time.monotonic() - started, "s"))
        rows += new
        print("\n".join(show(row) for row in new), flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"about": found, "transport": transport, "rows": [row._asdict() for row in rows]}, indent=1)
        )
    failed = [row for row in rows if row.ok is False]
    print(
        f"\n{len(failed)} failed of {sum(row.ok is not None for row in rows)} checks, {time.monotonic() - begin:.0f} s"
    )
    for row in failed:
        print(show(row))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
