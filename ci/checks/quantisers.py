"""Checkpoints that quantisers themselves write: `PYTHON -m ci.checks.quantisers FOLDER`, then the tests of their bytes.

PYTHON is of an environment of its own, since these want another transformers than vLLM does: `pip install
llmcompressor==0.14.0.1 auto-round==0.15.1`. This repository is the working folder. Then, in vLLM's environment:

    DWDP_WRITTEN=FOLDER python -m pytest tests/unit/written_elsewhere.py

A small Qwen3-MoE of random weights is written once and quantised in every way: experts only, on CPU. Static scales of
activations come from random tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from examples.checkpoints import CheckpointSpec, write_checkpoint
from examples.checkpoints.quantised import GROUP

#: Folder -> (its form among those of examples/checkpoints/quantised.py, llmcompressor's scheme, or bits and symmetric).
SCHEMES: Final[dict[str, tuple[str, str | tuple[int, bool]]]] = {
    "llmcompressor-fp8-channel": ("ct-fp8-channel", "FP8_DYNAMIC"),
    "llmcompressor-fp8-block": ("ct-fp8-block", "FP8_BLOCK"),
    "llmcompressor-fp8-static": ("ct-fp8-tensor-static", "FP8"),
    "llmcompressor-int4": ("ct-int4", (4, True)),
    "llmcompressor-int4-zeros": ("ct-int4-zeros", (4, False)),
    "llmcompressor-int8": ("ct-int8", (8, True)),
    "llmcompressor-w8a8": ("ct-w8a8", "INT8"),
    "llmcompressor-nvfp4": ("ct-nvfp4", "NVFP4"),
    "llmcompressor-nvfp4-w4a16": ("ct-nvfp4-w4a16", "NVFP4A16"),
    "llmcompressor-mxfp4": ("ct-mxfp4", "MXFP4"),
}
#: The same of auto-round: bits, symmetric, format.
ROUNDED: Final[dict[str, tuple[str, int, bool, str]]] = {
    "auto-round-gptq-int4": ("gptq-int4", 4, True, "auto_gptq"),
    "auto-round-gptq-int8": ("gptq-int8", 8, True, "auto_gptq"),
    "auto-round-awq-int4": ("awq-int4", 4, False, "auto_awq"),
}
#: Form of every folder, as tests want it.
FORMS: Final = {name: way[0] for name, way in {**SCHEMES, **ROUNDED}.items()}
SPEC: Final = CheckpointSpec(num_experts=5, num_layers=2, hidden=256, intermediate=128)
#: Those whose activations have scales that are told by the checkpoint.
_STATIC: Final = ("FP8", "NVFP4")
_SAMPLES, _TOKENS = 16, 64
_NEEDED: Final = ("llmcompressor", "auto_round", "datasets", "transformers")


def _compress(source: Path, way: str | tuple[int, bool], folder: Path) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    told: dict[str, Any] = {"targets": "Linear", "scheme": way}
    if not isinstance(way, str):
        weights = {"num_bits": way[0], "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": way[1]}
        told = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    recipe = QuantizationModifier(ignore=["lm_head", "re:.*self_attn.*", "re:.*gate$"], **told)
    if way in _STATIC:
        tokens = torch.randint(3, 500, (_SAMPLES, _TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
        data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * _TOKENS] * _SAMPLES})
        given = {"dataset": data, "num_calibration_samples": _SAMPLES, "max_seq_length": _TOKENS}
        oneshot(model=model, recipe=recipe, pipeline="basic", moe_calibrate_all_experts=True, **given)
    else:
        oneshot(model=model, recipe=recipe, pipeline="datafree")
    model.save_pretrained(folder, save_compressed=True)


def _round(source: Path, bits: int, symmetric: bool, form: str, folder: Path) -> None:
    from auto_round import AutoRound

    with tempfile.TemporaryDirectory() as scratch:
        attention = "q_proj,k_proj,v_proj,o_proj"
        more = {"device_map": "cpu", "disable_opt_rtn": True, "ignore_layers": attention}
        rounding = AutoRound(str(source), iters=0, bits=bits, group_size=GROUP, sym=symmetric, **more)
        rounding.quantize_and_save(scratch, format=form)
        # It makes a folder of its own within.
        shutil.copytree(next(Path(scratch).rglob("config.json")).parent, folder)


def _write(name: str, source: Path, folder: Path) -> None:
    if name in SCHEMES:
        _compress(source, SCHEMES[name][1], folder)
    else:
        _round(source, *ROUNDED[name][1:], folder)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)


def main() -> int:
    """Write those that are not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if lacking := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(
            f"{sys.executable} lacks {', '.join(lacking)}: use an environment with llmcompressor and auto-round"
        )
    source = write_checkpoint(SPEC, args.folder / "bf16")
    for name in FORMS:
        if not (place := args.folder / name).exists():
            # Whole or not at all: what is there is not written again.
            with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
                _write(name, source, made := Path(scratch) / name)
                made.rename(place)
            print(f"quantisers: {place}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
