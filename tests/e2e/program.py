"""A user's script: one LLM after the other, each generates with vLLM's progress bar; it ends without `del`.

python -m tests.e2e.program '{"model": path, "options": [LLM keyword arguments, ...], "repeats": 1, "tokens": 8}'
"""

from __future__ import annotations

import json
import sys

from tests.e2e.job import PROMPTS


def main() -> None:
    """Print the tokens of every LLM as one line of JSON."""
    spec = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=spec.get("tokens", 8), ignore_eos=True)
    for options in spec["options"]:
        llm = LLM(spec["model"], max_model_len=512, enforce_eager=True, gpu_memory_utilization=0.2, **options)
        llm.generate(PROMPTS * spec.get("repeats", 1), sampling)
        # One at a time, so that all LLMs see the same batches.
        alone = [llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].token_ids for prompt in PROMPTS]
        print("tokens", json.dumps([list(tokens) for tokens in alone]), flush=True)


if __name__ == "__main__":
    main()
