"""ci/bench/servers.py: which systems, how they are started, what their logs say, how they end; ci/bench/models.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ci.bench import servers as bench_servers
from ci.bench.models import MODELS, vocabulary, write_model

SITE = Path(bench_servers.__file__).parent / "site"
LOG = """\
\x1b[36m(EngineCore_DP0 pid=7)\x1b[0m INFO 11-25 20:13:53 [kv_cache_utils.py:2328] GPU KV cache size: 122,880 tokens, Maximum
\x1b[36m(EngineCore_DP1 pid=8)\x1b[0m INFO 11-25 20:13:53 [kv_cache_utils.py:2328] GPU KV cache size: 122,864 tokens, Maximum
(EngineCore_DP0 pid=7) WARNING 11-25 [fused_moe.py:1164] Using default MoE config. Performance might be sub-optimal! no E=128
(EngineCore_DP1 pid=8) WARNING 11-25 [fused_moe.py:1164] Using default MoE config. Performance might be sub-optimal! no E=128
(EngineCore_DP1 pid=8) INFO 11-25 20:13:50 [worker.py:125] dwdp rank 1: 64 of 128 experts, 3.62 GiB
(APIServer pid=1) INFO 11-25 20:13:40 [configure.py:155] dwdp: 2 independent ranks in groups of 2, workers in uni
"""


def test_systems_are_read() -> None:
    found = bench_servers.parse_systems(["dpep", 'dwdp:d112:{"experts_per_rank": 112, "weight_view": "split"}', "tp"])
    assert [(system.kind, system.name) for system in found] == [("dpep", "dpep"), ("dwdp", "d112"), ("tp", "tp")]
    assert found[1].dwdp == {"experts_per_rank": 112, "weight_view": "split"}
    assert bench_servers.base_of(found) == "dpep"
    assert bench_servers.base_of(bench_servers.parse_systems(["replicas", "dwdp"])) == "replicas"


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["ep", "dpep"], "one of dwdp, dpep"),
        (["dpep:other"], "only dwdp takes"),
        (["dpep", "dwdp:a:{"], "no JSON"),
        (["dpep", "dwdp:a:[1]"], "no JSON object"),
        (["dpep", "dwdp", "dwdp"], "its own name"),
        (["dpep", "dwdp", "tp", "replicas"], "at most three"),
        (["dwdp", "tpep"], "add dpep or dptp or replicas or tp"),
    ],
)
def test_systems_that_cannot_be_compared_are_refused(texts: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        bench_servers.parse_systems(texts)


def test_words_and_devices_of_each_system() -> None:
    dpep, dwdp, tp = bench_servers.parse_systems(["dpep", 'dwdp:d:{"experts_per_rank": 5}', "tp"])
    replicas = bench_servers.parse_system("replicas")
    assert bench_servers.words_of(dpep, 2) == ["--data-parallel-size", "2", "--enable-expert-parallel"]
    assert bench_servers.words_of(tp, 2) == ["--tensor-parallel-size", "2"]
    assert bench_servers.words_of(replicas, 2) == []
    words = bench_servers.words_of(dwdp, 2)
    assert words[:4] == ["--data-parallel-size", "2", "--distributed-executor-backend", "dwdp"]
    assert json.loads(words[words.index("--additional-config") + 1]) == {"dwdp": {"experts_per_rank": 5}}
    assert bench_servers.places_of(dpep, ["3", "4"], False) == [{"CUDA_VISIBLE_DEVICES": "3,4"}]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in bench_servers.places_of(replicas, ["3", "4"], False)] == [
        "3",
        "4",
    ]
    assert [place["VLLM_CPU_OMP_THREADS_BIND"] for place in bench_servers.places_of(dwdp, ["0", "1"], True)] == ["0|1"]


def test_ranks_of_two_devices() -> None:
    dptp, dpep, tp = (bench_servers.parse_system(kind) for kind in ("dptp", "dpep", "tp"))
    words = bench_servers.words_of(dptp, 8)
    assert words == ["--data-parallel-size", "4", "--tensor-parallel-size", "2", "--enable-expert-parallel"]
    assert bench_servers.places_of(dptp, ["3", "4", "5", "6"], False) == [{"CUDA_VISIBLE_DEVICES": "3,4,5,6"}]
    assert bench_servers.base_of([tp, dptp]) == "dptp"
    for number in (1, 2, 3, 5):
        with pytest.raises(ValueError, match=f"dptp: it takes 4 devices or any larger even number, and has {number}:"):
            bench_servers.check_devices([dpep, dptp], number)
        bench_servers.check_devices([dpep, tp], number)
    for number in (4, 6, 8):
        bench_servers.check_devices([dpep, dptp], number)


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("dptp", ["0", "1"]),
        ("dpep", ["0", "1", "2", "3"]),
        ("dwdp", ["0", "1", "2", "3"]),
        ("tp", []),
        ("replicas", []),
    ],
)
def test_ranks_that_requests_are_pinned_to(
    kind: str, ranks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_servers.subprocess, "Popen", lambda *_, **__: None)
    server = bench_servers.Server(bench_servers.parse_system(kind), tmp_path, [], list("0123"), False, tmp_path)
    pinned = server.targets(pinned=True)
    assert [target.headers["X-data-parallel-rank"] for target in pinned if target.headers] == ranks
    assert len({target.url for target in pinned}) == (4 if kind == "replicas" else 1)
    assert not any(target.headers for target in server.targets(pinned=False))


def test_a_log_tells_tokens_of_all_engines_tiles_and_dwdp() -> None:
    facts = bench_servers.read_log(LOG)
    assert (facts.kv_tokens, facts.engines) == (245744, 2)
    assert facts.tiles == ["Using default MoE config. Performance might be sub-optimal! no E=128"]
    assert facts.dwdp == [
        "dwdp rank 1: 64 of 128 experts, 3.62 GiB",
        "dwdp: 2 independent ranks in groups of 2, workers in uni",
    ]


@pytest.mark.parametrize("name", ["tiny", "qwen3-fp8", "qwen3-int4", "deepseek-v3", "gpt-oss-mxfp4"])
def test_models_are_written_as_transformers_reads_them(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = write_model(name, 3, tmp_path / name)
    spec, vocab = MODELS[name]
    config = AutoConfig.from_pretrained(folder)
    assert config.num_hidden_layers == 3 and config.vocab_size == vocab == vocabulary(folder)
    values = json.loads((folder / "config.json").read_text())
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    assert [values[name] for name in names if name in values] == [spec.num_experts]
    assert bool(values.get("quantization_config")) == (spec.fp8 or bool(spec.experts))
    assert AutoTokenizer.from_pretrained(folder).decode([7, vocab - 1]) == f"w7 w{vocab - 1}"


def test_a_server_ends_with_everything_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A program in place of vLLM: it ignores SIGTERM, and has a child that does.
    code = (
        "import mmap, os, signal, time\n"
        "name = f'/dev/shm/bench-test-{os.getpid()}'\n"
        "with open(name, 'w+b') as file:\n"
        "    file.truncate(4096)\n"
        "    kept = mmap.mmap(file.fileno(), 4096)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.fork()\n"
        "print('KV cache size: 1,000 tokens', flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(f"#!{os.path.realpath('/proc/self/exe')}\n{code}")
    (tmp_path / "python").chmod(0o755)
    server = bench_servers.Server(bench_servers.parse_system("replicas"), tmp_path, [], ["0", "1"], False, tmp_path)
    deadline = time.monotonic() + 20
    while server.facts().engines < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.facts().kv_tokens == 4000
    leaders = [process.pid for process in server._processes]
    assert [len(bench_servers.session(leader)) for leader in leaders] == [2, 2]
    assert all(Path(f"/dev/shm/bench-test-{leader}").exists() for leader in leaders)
    with pytest.raises(bench_servers.ServerFailed, match="not up in time"):
        server.wait(time.monotonic() + 0.1)
    server.stop(limit_s=0.5)
    assert [bench_servers.session(leader) for leader in leaders] == [[], []]
    assert not any(Path(f"/dev/shm/bench-test-{leader}").exists() for leader in leaders)


def library(folder: Path, source: str) -> Path:
    """A shared library of C code."""
    (folder / "nccl.c").write_text(source)
    made = folder / "libnccl.so.2"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, folder / "nccl.c"], check=True)
    return made


def test_functions_that_a_library_lacks_are_taken_from_vllms_list(tmp_path: Path) -> None:
    code = (
        "from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary as L\n"
        "print([f.name for f in L.exported_functions])"
    )
    old = library(tmp_path, "void ncclCommResume(void) {}\n")
    env = {**os.environ, "PYTHONPATH": str(SITE), "VLLM_NCCL_SO_PATH": str(old)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    last = done.stdout.splitlines()[-1]
    assert "ncclAllReduce" in last and "ncclCommResume" in last and "ncclCommSuspend" not in last


def test_a_library_that_has_both_functions_lacks_nothing(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("bench_site", SITE / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    new = library(tmp_path, "void ncclCommSuspend(void) {}\nvoid ncclCommResume(void) {}\n")
    assert site.lacking(str(new)) == ()


def test_logs_that_are_read_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    assert bench_servers.environment({})["VLLM_LOGGING_LEVEL"] == "INFO"
