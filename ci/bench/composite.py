"""vLLM's kernels on a composite range, beside the same on memory of torch: `python -m ci.bench.composite --json FILE`.

One GPU. Every tensor of a layer's experts is there three times: as torch allocates it, once more so (`again`: what two
alike differ by), and as the composite view makes it, own pages and a slot's next to each other in one range of addresses.
The same kernel computes on each, in turns; results are compared bit for bit. RATIO is the time on torch's memory by that on
the other, above 1 where the other is faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from ci.bench.results import as_text
from ci.bench.run import command, machine, versions
from ci.bench.turns import bounds
from ci.bench.words import check_numbers, check_places
from vllm_dwdp.kernels.bench.shapes import MODELS, TINY_MODELS, Batch, ModelShape, Problem, free_memory
from vllm_dwdp.kernels.bench.sides import vllm_experts
from vllm_dwdp.kernels.bench.timing import captured, in_turns
from vllm_dwdp.kernels.weight_table import WeightTable

#: Of the same kernel on torch's memory.
GOAL: Final = 0.99
GROUP: Final = 128
KINDS: Final = ("bf16", "fp8-block", "int4-marlin")

Layer = Callable[[Batch], torch.Tensor]


class Row(NamedTuple):
    """ratio, low, high: median and 95 % bounds over the turns; again: the median of two alike. equal: whether results on
    pages are those on torch's memory, alike: whether those on two of torch's are, bit for bit."""

    kind: str
    tokens: int
    us: float
    ratio: float
    low: float
    high: float
    again: float
    equal: bool
    alike: bool


class Pages:
    """Copies of tensors on composite ranges: the first half of the pages own, the others a slot's."""

    def __init__(self, cpu: bool) -> None:
        self._transport: Any = None
        if not cpu:
            from vllm_dwdp.transport.cuda_bindings import BindingsVmm
            from vllm_dwdp.transport.cuda_copy import CopyOptions
            from vllm_dwdp.transport.cuda_cupy import CupyDevice
            from vllm_dwdp.transport.vmm import VmmTransport

            device = CupyDevice(0)
            self._transport = VmmTransport(device, BindingsVmm(device.index), CopyOptions())

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same bytes; a plain copy where there is no GPU."""
        if self._transport is None:
            return tensor.clone()
        from vllm_dwdp.transport.vmm import Part

        page, nbytes = self._transport.page, tensor.nbytes
        pages = -(-nbytes // page)
        own = self._transport.allocate_pieces([page * max(1, pages // 2)])
        parts = [Part(own, 0)]
        if pages > 1:
            parts.append(Part(self._transport.allocate_slot_pieces([page * (pages - pages // 2)]), 0))
        seen: torch.Tensor = self._transport.compose(parts).tensor()[:nbytes]
        made = seen.view(tensor.dtype).view(tensor.shape)
        made.copy_(tensor)
        return made

    def close(self) -> None:
        """Let go of all of them."""
        if self._transport is not None:
            torch.cuda.synchronize()
            self._transport.close()


def layers(kind: str, model: ModelShape, device: torch.device, pages: Pages) -> list[Layer]:
    """The same layer on memory of torch, once more so, and on pages."""
    if kind == "int4-marlin":
        weights = marlin_weights(model, device)
        copies = [weights, [w.clone() for w in weights], [pages.copy(w) for w in weights]]
        return [marlin(model, made) for made in copies]
    problem = Problem(model, device)
    copies = [problem.dense, [w.clone() for w in problem.dense], [pages.copy(w) for w in problem.dense]]

    def layer(dense: list[torch.Tensor]) -> Layer:
        tables = [
            WeightTable.of(list(made), scales=table.scales) for made, table in zip(dense, problem.tables, strict=True)
        ]

        def call(batch: Batch) -> torch.Tensor:
            problem.dense, problem.contiguous = dense, tables  # the latter without a GPU
            return vllm_experts(problem, batch)

        return call

    return [layer(dense) for dense in copies]


def marlin_weights(model: ModelShape, device: torch.device) -> list[torch.Tensor]:
    """w13 and w2 as Marlin packs four bits, int32 [E, K / 16, 2 N], and their scales, bfloat16 [E, K / GROUP, N]."""
    made = []
    for rows, cols in ((2 * model.width, model.hidden), (model.hidden, model.width)):
        shape = (model.experts, cols // 16, 2 * rows)
        made.append(torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=device).to(torch.int32))
    for rows, cols in ((2 * model.width, model.hidden), (model.hidden, model.width)):
        scales = torch.rand(model.experts, cols // GROUP, rows, device=device) * (0.1 * cols**-0.5)
        made.append(scales.to(torch.bfloat16))
    return made


def marlin(model: ModelShape, weights: Sequence[torch.Tensor]) -> Layer:
    """The layer by vLLM's Marlin kernel."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.scalar_type import scalar_types

    w13, w2, scales13, scales2 = weights
    activation = MoEActivation.from_str(model.activation.kind)

    def call(batch: Batch) -> torch.Tensor:
        result: torch.Tensor = fused_marlin_moe(
            batch.hidden, w13, w2, None, None, scales13, scales2, batch.weights, batch.ids,
            quant_type_id=scalar_types.uint4b8.id, activation=activation,
        )  # fmt: skip
        return result

    return call


def rows(kind: str, model: ModelShape, args: argparse.Namespace) -> Iterator[Row]:
    """A row for each number of tokens."""
    device = torch.device("cpu" if args.cpu else "cuda:0")
    pages = Pages(args.cpu)
    made = layers(kind, model, device, pages)
    shaped = Problem(TINY_MODELS[0], device)  # for batches: its own sizes are replaced
    shaped.model = model
    for tokens in args.tokens:
        batches = [shaped.batch(tokens, seed) for seed in range(2)]
        results = [[layer(batch).clone() for batch in batches] for layer in made]
        alike, equal = (
            all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(results[0], other, strict=True))
            for other in results[1:]
        )
        calls = [captured([lambda b=b, k=k: k(b) for b in batches], device) for k in made]
        own = in_turns(calls[0], calls[2], device, args.turns, args.turn_s)
        again = in_turns(calls[0], calls[1], device, args.turns, args.turn_s)
        us, twice = statistics.median(own.own) * 1e6, statistics.median(again.ratios)
        yield Row(kind, tokens, us, *bounds(own.ratios), twice, equal, alike)
    made.clear()
    pages.close()
    free_memory(device)


def main() -> int:
    """Measure and print; 1 where the goal is missed, or results differ that do not on two memories alike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 1024, 8192])
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--turn-s", type=float, default=0.04, help="of both sides together (%(default)s)")
    parser.add_argument(
        "--cpu", action="store_true", help="try this without a GPU and without pages: figures mean nothing"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        check_numbers(args)
        check_places(args, "json")
        if any(tokens < 1 for tokens in args.tokens):
            raise ValueError(f"--tokens {' '.join(map(str, args.tokens))}: write 1 or more")
        if not args.cpu and not torch.cuda.is_available():
            raise ValueError("there is no GPU here: --cpu tries this without one")
        if args.cpu and "int4-marlin" in args.kinds:
            raise ValueError("--cpu: Marlin's kernels need a GPU: --kinds bf16 fp8-block")
    except ValueError as error:
        parser.error(str(error))
    models = (TINY_MODELS[0], TINY_MODELS[1]) if args.cpu else (MODELS[0], MODELS[2])
    of = {"bf16": models[0], "fp8-block": models[1], "int4-marlin": models[0]}
    found: list[Row] = []
    for kind in args.kinds:
        for row in rows(kind, of[kind], args):
            found.append(row)
            said = "equal" if row.equal else "DIFFERS" if row.alike else "differs, as two alike do"
            print(
                f"{kind:12} {row.tokens:6} tokens {row.us:9.1f} us  ratio {row.ratio:.3f} ({row.low:.3f} to {row.high:.3f})"
                f"  again {row.again:.3f}  {said}",
                flush=True,
            )
    if args.json:
        told = {"machine": machine(args.cpu), "versions": versions(), "command": command()}
        args.json.write_text(as_text({**told, "rows": [row._asdict() for row in found]}))
    missed = [row for row in found if row.high < GOAL]
    print("".join(f"below {GOAL}: {row.kind}, {row.tokens} tokens\n" for row in missed), end="")
    return int(any(row.alike and not row.equal for row in found) or (bool(missed) and not args.cpu))


if __name__ == "__main__":
    sys.exit(main())
