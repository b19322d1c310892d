"""`vllm bench serve` on a server of loads.py, with the same lengths and as many requests at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from ci.bench.load import Load
from ci.bench.servers import SERVED, ServerFailed

#: Seconds of load: long, so that its begin and its end, where fewer requests are in flight, count little.
_LOAD_S: Final = 15.0


def words(load: Load, url: str, model: Path, tokens_per_s: float, result: Path) -> list[str]:
    """Its command for about _LOAD_S at the rate that was measured. result: the file to write."""
    rounds = max(3, round(_LOAD_S * tokens_per_s / (load.input + load.output) / load.concurrency))
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", url),
        *("--model", SERVED, "--tokenizer", str(model), "--endpoint", "/v1/completions", "--dataset-name", "random"),
        *("--random-input-len", str(load.input), "--random-output-len", str(load.output)),
        *("--random-range-ratio", json.dumps({"input": load.spread, "output": load.spread})),
        *("--num-prompts", str(rounds * load.concurrency), "--max-concurrency", str(load.concurrency)),
        *("--ignore-eos", "--temperature", "0", "--disable-tqdm", "--save-result"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def tokens_per_s(load: Load, url: str, model: Path, rate: float, limit_s: float) -> float:
    """What it finds: input and output tokens per second; rate: what was measured here. Raises ServerFailed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        result = Path(folder) / "result.json"
        command = words(load, url, model, rate, result)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"vllm bench serve took more than {limit_s:.0f} s") from None
        if done.returncode or not result.exists():
            raise ServerFailed(f"vllm bench serve ended with {done.returncode}: {done.stderr[-300:]}")
        found = json.loads(result.read_text())
    if found["failed"] or not found["completed"]:
        raise ServerFailed(f"vllm bench serve: {found['failed']} requests failed, {found['completed']} did not")
    return float(found["total_token_throughput"])
