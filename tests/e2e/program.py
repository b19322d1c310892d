"""A user's script: one LLM after the other, each generates with vLLM's progress bar; it ends without `del`.

python -m tests.e2e.program '{"model": path, "options": [LLM keyword arguments, ...], "repeats": 1, "tokens": 8}'

`inside`: programs like this one, started together while the last LLM is alive. `end`: how it ends, see ENDS, or `del`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

from tests.e2e.job import PROMPTS


def _raise() -> None:
    raise RuntimeError("as asked")


#: How a program ends: at its last line with its LLM alive, by `sys.exit` or by an exception.
ENDS: dict[str, Callable[[], object]] = {"return": lambda: None, "exit": lambda: sys.exit(3), "raise": _raise}


def main() -> None:
    """Print the tokens of every LLM as one line of JSON, then what programs inside printed."""
    spec = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=spec.get("tokens", 8), ignore_eos=True)
    for options in spec["options"]:
        llm = LLM(spec["model"], max_model_len=512, enforce_eager=True, gpu_memory_utilization=0.2, **options)
        llm.generate(PROMPTS * spec.get("repeats", 1), sampling)
        # One at a time, so that all LLMs see the same batches.
        alone = [llm.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].token_ids for prompt in PROMPTS]
        print("tokens", json.dumps([list(tokens) for tokens in alone]), flush=True)
    inside = [
        subprocess.Popen([sys.executable, "-m", "tests.e2e.program", json.dumps({"model": spec["model"], **inner})])
        for inner in spec.get("inside", [])
    ]
    for process in inside:
        print("inside ended with", process.wait(300), flush=True)
    if spec.get("end") == "del":
        del llm
    else:
        ENDS[spec.get("end", "return")]()


if __name__ == "__main__":
    main()
