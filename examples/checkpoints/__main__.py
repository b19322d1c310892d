"""python -m examples.checkpoints OUT --family qwen3_moe --experts 8 ..."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_dwdp.errors import DwdpError

from .quantised import FORMS
from .spec import FAMILIES, ITEM_SIZES, CheckpointSpec
from .write import write_checkpoint


def main() -> None:
    default = CheckpointSpec()
    parser = argparse.ArgumentParser(
        prog="python -m examples.checkpoints", description="Make a tiny random checkpoint that vLLM loads."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--family", choices=list(FAMILIES), default=default.family)
    sizes = {
        "--experts": ("num_experts", "routed experts of a layer"),
        "--layers": ("num_layers", "layers"),
        "--dense-layers": ("dense_layers", "layers without experts at the start (deepseek_v3)"),
        "--hidden": ("hidden", "hidden size"),
        "--intermediate": ("intermediate", "intermediate size of one expert"),
        "--top-k": ("top_k", "experts a token is sent to"),
        "--heads": ("num_heads", "attention heads"),
        "--kv-heads": ("num_kv_heads", "key/value heads"),
        "--head-dim": ("head_dim", "size of a head"),
        "--max-position": ("max_position", "longest context"),
        "--seed": ("seed", "seed of the weights"),
    }
    for flag, (name, text) in sizes.items():
        parser.add_argument(flag, dest=name, type=int, default=getattr(default, name), help=f"{text} (%(default)s)")
    parser.add_argument("--dtype", choices=list(ITEM_SIZES), default=default.dtype)
    parser.add_argument("--fused", action="store_true", help="all experts of a layer in one tensor")
    parser.add_argument("--fp8", action="store_true", help="weights in FP8 with scales per block")
    parser.add_argument(
        "--quantised", dest="experts", choices=list(FORMS), default="", help="form of the experts alone"
    )
    parser.add_argument("--shard-mib", type=float, help="split the weights into files of this size")
    parser.add_argument(
        "--router-skew", type=float, default=default.router_skew, help="hit a quarter of the experts most (%(default)s)"
    )
    args = vars(parser.parse_args())
    out: Path = args.pop("out")
    try:
        spec = CheckpointSpec(**args)
        write_checkpoint(spec, out)
    except DwdpError as e:
        raise SystemExit(f"error: {e}") from None
    total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    experts = spec.num_moe_layers * spec.num_experts * sum(spec.expert_bytes)
    print(f"{out}: {spec.family}, {total / 2**20:.1f} MiB, of which experts {experts / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
