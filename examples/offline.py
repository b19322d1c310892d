"""Batch generation on ranks that share their experts: plain vLLM code with two more arguments.

    python examples/offline.py [--model PATH] [--ranks 2]

Without --model a small random checkpoint is written first; its text is as random as its weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from devices import dwdp_settings, engine_options

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB per rank, on CPU
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

PROMPTS = [
    "The experts of a layer",
    "Every rank serves its own requests and",
    "A copy engine pulls",
    "No rank waits",
    "Attention comes first, then",
    "Two slots are enough when",
]


def small_checkpoint() -> str:
    """Write a small random MoE checkpoint with a tokenizer, unless it is there, and return its folder."""
    here = Path(__file__).resolve().parent
    folder = here.parent / ".cache" / "examples" / "qwen3_moe"
    subprocess.run([sys.executable, "-m", "checkpoints", str(folder), "--experts", "16"], check=True, cwd=here)
    return str(folder)


def main() -> None:
    """Generate, chat, and print what every rank did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model or small_checkpoint(),
        distributed_executor_backend="dwdp",
        data_parallel_size=args.ranks,
        max_model_len=256,
        enforce_eager=True,  # starts faster; torch.compile works as well
        **engine_options(args.ranks),  # these two are empty but for ranks that share a GPU
        additional_config={"dwdp": dwdp_settings(args.ranks)},
    )
    sampling = SamplingParams(temperature=0, max_tokens=24)
    # Spread over the ranks by load; results come back in the order of the prompts.
    for output in llm.generate(PROMPTS, sampling):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    chat = llm.chat([{"role": "user", "content": "Who holds the experts?"}], sampling, use_tqdm=False)
    print(f"chat -> {chat[0].outputs[0].text!r}")

    import vllm_dwdp  # only for the counters

    for counter in vllm_dwdp.counters(llm):
        if counter["view"] == "inplace":
            how = "others' experts read in their memory"
        else:
            how = f"{counter['pulled_bytes'] / 1e6:.2f} MB of others' experts copied"
        print(
            f"rank {counter['rank']}: {counter['requests']} requests, {counter['forwards']} forwards, "
            f"{counter['experts_held']} experts of a layer in {counter['slab_bytes'] / 1e6:.2f} MB, "
            f"view {counter['view']}: {how}"
        )


if __name__ == "__main__":  # vLLM starts its engines as new processes, which import this file
    main()
