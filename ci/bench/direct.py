"""Experts read over a link by the kernels themselves: how near to the link's rate. `python -m ci.bench.direct --out FOLDER`.

One process, two GPUs (one: the peer's memory is pinned memory of the host): a layer of Qwen3-30B-A3B's shape, some of its
experts in the other one's memory. For each number of tokens, in microseconds a layer, every routing a fresh one: all
experts local with `tiles_for`; direct with `tiles_for`; direct with `direct_tiles_for`, unspread and as it is. The bound is
the larger of two times: distinct missing experts at the rate of a large copy over the same link, and all local.

Rows go to FOLDER/direct.json as they come. --search first looks for tiles of direct reads and writes them, beside the
shipped rows of this device, to FOLDER/configs/<device>.json, which belongs into kernels/configs; tables found there are
used. --trial runs all of it on a CPU (TRITON_INTERPRET=1), tiny.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ci.bench.direct_layer import Layer, Link, open_peer, us
from ci.checks.visible import gpus_for
from vllm_dwdp.kernels import tables
from vllm_dwdp.kernels.bench.candidates import SHARED
from vllm_dwdp.kernels.bench.shapes import MODELS, TINY_MODELS, Batch, Problem
from vllm_dwdp.kernels.bench.sides import LOST, describe
from vllm_dwdp.kernels.bench.tune import TOLERANCE
from vllm_dwdp.kernels.configs import tiles_for
from vllm_dwdp.kernels.direct_tiles import HEIGHTS, direct_key, direct_tiles_for, height
from vllm_dwdp.kernels.split_moe import Workspace
from vllm_dwdp.kernels.tiles import Tiles

CONFIGS = "configs"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SEARCHED = (64, 16, 256, 1, 1024, 512, 4, 128)
#: (block_n, block_k, num_warps, num_stages), best guesses first; what does not fit beside block_m is left out.
FLAT = ((64, 128, 4, 4), (128, 64, 4, 4), (64, 64, 4, 5), (32, 256, 4, 3), (128, 128, 4, 3), (64, 256, 4, 3),
        (32, 128, 4, 5), (128, 128, 8, 4), (64, 128, 4, 3), (256, 64, 8, 4))  # fmt: skip
TALL = ((128, 64, 8, 4), (64, 128, 4, 4), (128, 128, 8, 3), (64, 64, 4, 4), (128, 64, 4, 4), (256, 64, 8, 3),
        (64, 128, 8, 3), (32, 128, 4, 4))  # fmt: skip
FP8 = ((128, 128, 4, 4), (64, 128, 4, 4), (128, 128, 4, 3), (64, 128, 4, 6), (128, 128, 8, 4), (32, 128, 4, 4),
       (128, 128, 4, 6))  # fmt: skip
#: (spread, group_m): experts in order; runs side by side; all experts side by side, column by column.
ORDERS = ((16, 1), (1, 256), (1, 1), (8, 1), (32, 1))


def candidates(layer: Layer, tokens: int, trial: bool) -> Iterator[Tiles]:
    """Of the height that the rows need, and the next one."""
    itemsize, low = layer.problem.tables[0].dtype.itemsize, height(tokens, layer.shape.top_k, layer.experts)
    heights = [rows for rows in HEIGHTS if low <= rows <= 2 * low]
    for rows in heights:
        sizes = FP8 if itemsize == 1 else FLAT if rows < 64 else TALL
        for block_n, block_k, warps, stages in sizes[: 1 if trial else len(sizes) if rows == low else 3]:
            # Scales of blocks take as many registers again as the sums.
            spilled = itemsize == 1 and rows * block_n > 64 * 32 * warps
            if not spilled and (rows + block_n) * block_k * itemsize * (stages - (rows < 64)) <= SHARED:
                yield Tiles(rows, block_n, block_k, 1, warps, stages, spread=16)


def search(layer: Layer, options: argparse.Namespace, path: Path, ends: float) -> None:
    """The best tiles for each number of tokens, by the product of the times at each number of held experts."""
    device, trial = layer.problem.device, options.trial
    listed = {tokens: list(candidates(layer, tokens, trial)) for tokens in options.searched}
    for tokens, chosen in listed.items():
        begun, count = time.monotonic(), 1 if trial else 3
        if begun > ends:
            print(f"time is over: {layer.shape.dtype} from {tokens} tokens on was not searched")
            return
        room, batches = layer.room(tokens), layer.batches(tokens, count)
        start = tiles_for(layer.shape, tokens, device, layer.block)
        expected = layer.run(layer.tables[layer.experts], batches[0], start, room).float()

        def scored(tried: Sequence[Tiles], rounds: int, tokens: int = tokens, room: Workspace = room,
                   batches: Sequence[Batch] = batches, expected: torch.Tensor = expected) -> dict[Tiles, float]:  # fmt: skip
            layer.compile({tokens: tried}, options.workers)
            calls: dict[Any, Callable[[], object]] = {}
            for tiles in tried:
                try:
                    off = (
                        (layer.run(layer.tables[layer.held[0]], batches[0], tiles, room).float() - expected).abs().max()
                    )
                    if not off < TOLERANCE[layer.problem.model.quant] * expected.abs().max():
                        raise RuntimeError(f"off by {float(off):.1e}")
                    made = {(tiles, held): layer.call(layer.tables[held], batches, tiles, room) for held in layer.held}
                except Exception as error:
                    print(f"    {describe(tiles)}: {(str(error).splitlines() or [''])[0][:110]}", flush=True)
                    if any(word in str(error) for word in LOST):
                        raise
                    continue
                calls |= made
            took = us(calls, len(batches), device, rounds)
            done = dict.fromkeys(tiles for tiles, _ in took)
            return {tiles: statistics.geometric_mean([took[tiles, held] for held in layer.held]) for tiles in done}

        found = scored([start, *chosen], 3)
        best = sorted((tiles for tiles in found if tiles in chosen), key=found.__getitem__)[: 1 if trial else 2]
        orders = [replace(best[0], spread=spread, group_m=group) for spread, group in ORDERS]
        orders += [*best, replace(best[-1], spread=1, group_m=256)]
        again = scored(list(dict.fromkeys([start, *orders])), 1 if trial else 7)
        fastest = sorted((tiles for tiles in again if tiles in orders), key=again.__getitem__)
        tables.write(path, direct_key(layer.shape), {tokens: (fastest[0], again[start] / again[fastest[0]])},
                     tables.chip_of(device))  # fmt: skip
        said = ", ".join(f"{describe(tiles)} {again[tiles]:.0f}" for tiles in fastest[:3])
        print(f"search {layer.shape.dtype:<9} {tokens:>5}: {said} us; {describe(start)} {again[start]:.0f} us; "
              f"{len(found) + len(again)} tried, {time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
        options.searches.append({"dtype": layer.shape.dtype, "tokens": tokens,
                                 "us": {describe(tiles): value for tiles, value in (found | again).items()}})  # fmt: skip


def measure(layer: Layer, link: Link, options: argparse.Namespace, ends: float) -> Iterator[dict[str, Any]]:
    """One row per number of tokens and of held experts."""
    device, trial = layer.problem.device, options.trial
    shipped = {tokens: tiles_for(layer.shape, tokens, device, layer.block) for tokens in options.tokens}
    direct = {tokens: direct_tiles_for(layer.shape, tokens, device, layer.block, folder=options.out / CONFIGS)
              for tokens in options.tokens}  # fmt: skip
    unspread = {tokens: replace(tiles, spread=1, group_m=1) for tokens, tiles in direct.items()}
    layer.compile({t: (shipped[t], direct[t], unspread[t]) for t in options.tokens}, options.workers)
    local = layer.tables[layer.experts]
    for tokens in options.tokens:
        if time.monotonic() > ends:
            print(f"time is over: {layer.shape.dtype} from {tokens} tokens on was not measured")
            return
        count = 1 if trial else 8 if tokens <= 64 else 4
        room, batches = layer.room(tokens), layer.batches(tokens, count)
        calls: dict[Any, Callable[[], object]] = {("local", 0): layer.call(local, batches, shipped[tokens], room)}
        for held in layer.held:
            tabled = layer.tables[held]
            for name, tiles in (("shipped", shipped), ("unspread", unspread), ("direct", direct)):
                calls[name, held] = layer.call(tabled, batches, tiles[tokens], room)
        took = us(calls, count, device, 1 if trial else 9)
        expected = layer.run(local, batches[0], direct[tokens], room)
        for held in layer.held:
            same = torch.equal(layer.run(layer.tables[held], batches[0], unspread[tokens], room), expected)
            missing = layer.bytes_missing(batches, held)
            bound = max(missing / link.rate * 1e6, took["local", 0])
            row = {
                "dtype": layer.shape.dtype, "tokens": tokens, "held": held, "experts": layer.experts, "equal": same,
                "local_us": took["local", 0], "bytes": missing, "bound_us": bound,
                "tiles": direct[tokens].to_json(), "shipped_tiles": shipped[tokens].to_json(),
            }  # fmt: skip
            for name in ("shipped", "unspread", "direct"):
                row |= {f"{name}_us": took[name, held], f"{name}_ratio": bound / took[name, held]}
            yield row


def main() -> int:
    """Command line; 1 where a result differs from the local one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("direct"), help="folder of direct.json and configs/")
    parser.add_argument("--search", action="store_true", help="search tiles first, for 60 percent of the time at most")
    parser.add_argument("--limit-s", type=float, default=400, help="begin nothing new after so many seconds")
    parser.add_argument("--tokens", type=int, nargs="*", default=[])
    parser.add_argument("--dtype", nargs="*", default=["bf16", "fp8_block"], choices=["bf16", "fp8_block"])
    parser.add_argument("--workers", type=int, default=28, help="threads that compile")
    parser.add_argument("--trial", action="store_true", help="on a CPU, a tiny layer, one routing")
    options = parser.parse_args()
    gpus_for(parser, options.trial, "--trial tries this without one")
    begun, options.searches, options.searched = time.monotonic(), [], SEARCHED
    ends, rows = begun + options.limit_s, []
    device = torch.device("cpu") if options.trial else torch.device("cuda", 0)
    if options.trial:
        options.tokens, options.searched, models = options.tokens or [1, 4, 9], (4,), TINY_MODELS[:2]
    else:
        qwen, options.tokens = MODELS[0], options.tokens or list(TOKENS)
        models = (qwen, replace(qwen, name=f"{qwen.name}-FP8", quant="block"))
        torch.cuda.set_device(device)
    models = [model for model in models if ("fp8_block" if model.quant == "block" else "bf16") in options.dtype]
    link = open_peer(device, 1 << 20 if options.trial else 1 << 30)
    about = {"device": tables.chip_of(device).name, "peer": str(link.device), "copy_GB_s": link.rate / 1e9}
    print(about, flush=True)
    gc.freeze()  # or every capture looks at all that imports made
    path = options.out / CONFIGS / f"{tables.chip_of(device).name}.json"
    dtype = torch.float16 if options.trial else torch.bfloat16
    layers = []
    for model in models:
        held = (model.experts // 2, model.experts - max(1, model.experts // 8))
        layers.append(Layer(Problem(model, device, dtype), link, held))

    path.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        (options.out / "direct.json").write_text(
            json.dumps({**about, "rows": rows, "searches": options.searches}, indent=1)
        )

    if options.search:
        if not path.exists() and (shipped := tables.FOLDER / path.name).exists():
            shutil.copy(shipped, path)
        for number, layer in enumerate(layers):
            search(layer, options, path, begun + 0.6 * options.limit_s * (number + 1) / len(layers))
            save()
        tables.measured.cache_clear()
        tables._parsed.cache_clear()
    for layer in layers:
        for row in measure(layer, link, options, ends):
            rows.append(row)
            print(
                f"{row['dtype']:<9} {row['tokens']:>5} held {row['held']:>3}: local {row['local_us']:>6.0f}, bound "
                f"{row['bound_us']:>6.0f}, shipped {row['shipped_us']:>6.0f}, unspread {row['unspread_us']:>6.0f}, direct "
                f"{row['direct_us']:>6.0f} us: {row['direct_ratio']:.3f} {describe(Tiles(**row['tiles']))}"
                + ("" if row["equal"] else "  NOT EQUAL"), flush=True,
            )  # fmt: skip
            save()
    save()
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
