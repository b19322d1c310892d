"""One real offline engine, driven step by step as a user's program would; writes what it saw as JSON.

    python -m tests.e2e.job SPEC.json OUT.json

SPEC: {"model": path, "options": LLM keyword arguments, "steps": [name, ...]}. Run as a process of its own so that
`del llm` and exit can be checked, and so that only `from vllm import LLM` is imported.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPTS = [
    "The experts of a layer",
    "No rank waits",
    "Attention comes first, then",
    "A copy engine pulls the weights of the next layer while this one computes",
    "Two slots",
    "Every rank serves its own requests and no rank waits for another one because",
]
TOKENS = 12


def _greedy(llm: Any, prompts: list[str], **more: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, **more)
    return list(llm.generate(prompts, params, use_tqdm=False))


def tokens(llm: Any) -> list[list[int]]:
    """Greedy tokens, one request at a time: the same batches on any number of ranks."""
    return [list(_greedy(llm, [prompt])[0].outputs[0].token_ids) for prompt in PROMPTS]


def tokens_each_rank(llm: Any) -> list[list[list[int]]]:
    """Twice as many requests, one at a time: the client goes round, so that of two ranks each serves every prompt, of four
    every second one."""
    return [[list(_greedy(llm, [prompt])[0].outputs[0].token_ids) for _ in range(2)] for prompt in PROMPTS]


def batch(llm: Any) -> list[dict[str, Any]]:
    """All prompts at once, four times over, with logprobs: batches differ from plain vLLM's."""
    return _firsts(_greedy(llm, PROMPTS * 4, logprobs=5))


def batch_of_four(llm: Any) -> list[dict[str, Any]]:
    """As `batch`, of one engine: in the parts that each of four ranks gets of it, one after the other, each with no prefix
    in the KV cache, as on a rank that has not had these prompts before."""
    asked, parts = PROMPTS * 4, []
    for rank in range(4):
        assert llm.reset_prefix_cache()
        parts.append(_firsts(_greedy(llm, asked[rank::4], logprobs=5)))
    return [parts[i % 4][i // 4] for i in range(len(asked))]


def _firsts(outputs: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "first": found.token_ids[0],
            "logprob": found.logprobs[0][found.token_ids[0]].logprob,
            # Of the five most likely ones, as pairs, since JSON has no numbers for keys.
            "likely": [(token, of.logprob) for token, of in found.logprobs[0].items()],
        }
        for prompt, found in ((output.prompt, output.outputs[0]) for output in outputs)
    ]


def features(llm: Any) -> dict[str, Any]:
    """n > 1, chat, abort, structured output, a shared prefix, a long prompt in chunks."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    several = llm.generate(PROMPTS[:2], SamplingParams(temperature=0.8, n=3, seed=1, max_tokens=6), use_tqdm=False)
    chat = llm.chat([{"role": "user", "content": "hello"}], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    engine = llm.llm_engine
    ids = [
        engine.add_request(f"abort-{i}", PROMPTS[i], SamplingParams(max_tokens=200, ignore_eos=True)) for i in range(4)
    ]
    engine.step()
    engine.abort_request(ids[:3], internal=True)
    finished = []
    while engine.has_unfinished_requests():
        finished += [output.request_id for output in engine.step() if output.finished]
    choice = llm.generate(
        PROMPTS[0],
        SamplingParams(temperature=0, max_tokens=8, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])),
        use_tqdm=False,
    )
    long = " ".join(PROMPTS * 3)
    outputs = [_greedy(llm, [long])[0] for _ in range(4)]
    return {
        "n": [len(output.outputs) for output in several],
        "chat": len(chat[0].outputs[0].token_ids),
        "finished_after_abort": finished,
        "kept": "abort-3",
        "choice": choice[0].outputs[0].text,
        "long_prompt": len(outputs[0].prompt_token_ids),
        "long_cached": [output.num_cached_tokens for output in outputs],
        "long_tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


def embeddings_each_rank(llm: Any) -> list[list[list[float]]]:
    """Of each prompt, one request at a time, twice: the client alternates between ranks."""
    return [[list(llm.embed([prompt], use_tqdm=False)[0].outputs.embedding) for _ in range(2)] for prompt in PROMPTS]


def tokens_of_embeddings(llm: Any) -> list[list[list[int]]]:
    """As `tokens_each_rank`, of prompts that are given as random embeddings, [tokens, hidden] in the model's type."""
    import torch
    from vllm import SamplingParams

    config = llm.llm_engine.vllm_config.model_config
    drawn = torch.Generator().manual_seed(7)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    found = []
    for tokens in (3, 17, 40):
        embeds = torch.randn(tokens, config.get_hidden_size(), generator=drawn).to(config.dtype)
        asked = [llm.generate({"prompt_embeds": embeds}, params, use_tqdm=False)[0] for _ in range(2)]
        found.append([list(output.outputs[0].token_ids) for output in asked])
    return found


def counters(llm: Any) -> list[dict[str, Any]]:
    """Counters of all ranks."""
    import vllm_dwdp

    return vllm_dwdp.counters(llm)


def hits(llm: Any) -> dict[str, Any]:
    """Hits of all ranks together."""
    import dataclasses

    import vllm_dwdp

    return dataclasses.asdict(vllm_dwdp.hits(llm))


def ways(llm: Any) -> dict[str, Any]:
    """Ways to write or save weights, tried in every worker; then those of `LLM`, each with what it raised."""
    from vllm.v1.engine.core import EngineCore

    dense = llm.collective_rpc("probe_dense")
    seen: dict[str, Any] = {"ranks": llm.collective_rpc("probe_ways"), "llm": {}}
    update: dict[str, Any] = {"update_info": {}}
    core = llm.llm_engine.engine_core
    tries: dict[str, Callable[[], object]] = {
        "init": lambda: llm.init_weight_transfer_engine({"init_info": {}}),
        "start": llm.start_weight_update,
        "start_draft": llm.start_draft_weight_update,
        "update": lambda: llm.update_weights(update),
        "finish": llm.finish_weight_update,
        "reload": lambda: llm.collective_rpc("reload_weights"),
        "sleep": lambda: llm.sleep(level=2),
        "save_sharded_state": lambda: core.save_sharded_state("nowhere"),
    }
    if hasattr(EngineCore, "compute_weight_checksums"):  # not in vLLM 0.31
        tries["checksums"] = lambda: core.call_utility("compute_weight_checksums")
    for name, way in tries.items():
        try:
            way()
            seen["llm"][name] = ""
        except Exception as error:
            seen["llm"][name] = str(error)
    llm.wake_up()
    seen["dense_kept"] = llm.collective_rpc("probe_dense") == dense
    return seen


def _probe(name: str) -> Any:
    return lambda llm: llm.collective_rpc(name)


STEPS: dict[str, Any] = {
    "tokens": tokens,
    "tokens_each_rank": tokens_each_rank,
    "batch": batch,
    "batch_of_four": batch_of_four,
    "embeddings_each_rank": embeddings_each_rank,
    "tokens_of_embeddings": tokens_of_embeddings,
    "features": features,
    "counters": counters,
    "counters_after": counters,
    "hits": hits,
    "watch_routing": _probe("probe_watch_routing"),
    "routed": _probe("probe_routed"),
    "digests": _probe("probe_digests"),
    "memory": _probe("probe_memory"),
    "maps": _probe("probe_maps"),
    "affinity": _probe("probe_affinity"),
    "trace": _probe("probe_trace"),
    "swap_experts": _probe("probe_swap_experts"),
    "zero_pulls": _probe("probe_zero_pulls"),
    "ways": ways,
    "digests_kept": _probe("probe_digests"),
    "tokens_kept": tokens_each_rank,
    "tokens_tampered": tokens,
    "digests_tampered": _probe("probe_digests"),
}


def main() -> None:
    """Run the steps of a spec on one LLM."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM

    started = time.monotonic()
    options = {"max_model_len": 512, "enforce_eager": True, "gpu_memory_utilization": 0.2, **spec["options"]}
    llm = LLM(spec["model"], worker_extension_cls="tests.e2e.probe.Probe", **options)
    seen: dict[str, Any] = {"start_s": time.monotonic() - started}
    for step in spec["steps"]:
        seen[step] = STEPS[step](llm)
    del llm
    gc.collect()
    deadline = time.monotonic() + 10
    while (children := _children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    seen["children_after_del"] = children
    Path(sys.argv[2]).write_text(json.dumps(seen))


def _children() -> list[str]:
    """Command lines of live children, without Python's resource tracker, which lives as long as this process."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                command = (folder / "cmdline").read_text().replace(chr(0), " ")
            except OSError:
                continue
            if int(parent) == os.getpid() and state != "Z" and "resource_tracker" not in command:
                found.append(command)
    return found


if __name__ == "__main__":
    main()
