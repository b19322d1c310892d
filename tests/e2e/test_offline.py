"""Offline `LLM` with dwdp: what users call, negative controls, launchers, torch.compile."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import as_one_rank, default_view, dwdp, gpus, rank_cores, run_job, side_by_side

pytestmark = pytest.mark.e2e

VIEWS = ["contiguous", pytest.param(default_view(), marks=pytest.mark.full)]
#: Pulls on GPUs are CUDA graphs, which no Python function can stand in for.
TAMPER = {"contiguous": "swap_experts" if gpus() else "zero_pulls", default_view(): "swap_experts"}
STEPS = ["affinity", "digests", "tokens", "features", "counters"]
CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 16}
CORES = rank_cores(2)


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    """Sixteen experts in four layers."""
    return checkpoint(family="qwen3_moe", num_experts=16)


@pytest.fixture(scope="module")
def starting(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[dict[str, Any]]]:
    """Plain vLLM on one core, beside what else is started; on a GPU, where vLLM measures memory, before it."""
    folder = tmp_path_factory.mktemp("plain")
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(lambda: run_job(folder, model, ["digests", "tokens", "features"], **as_one_rank(2), **CHUNKS))
        if gpus():
            job.result()
        yield job


@pytest.fixture(scope="module")
def plain(starting: Future[dict[str, Any]]) -> dict[str, Any]:
    """What plain vLLM showed."""
    return starting.result()


@pytest.fixture(scope="module", params=VIEWS)
def shared(
    request: pytest.FixtureRequest,
    starting: Future[dict[str, Any]],
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """dwdp on two ranks in one view; at the end its weights are tampered with."""
    view = request.param
    kept = ["ways", "digests_kept", "tokens_kept"]
    steps = [*STEPS, *kept, TAMPER[view], "digests_tampered", "tokens_tampered"]
    job = run_job(tmp_path_factory.mktemp(view), model, steps, **CHUNKS, **dwdp(2, weight_view=view))
    return {"view": view, **job}


def test_tokens_and_bytes(shared: dict[str, Any], plain: dict[str, Any]) -> None:
    assert shared["tokens"] == plain["tokens"]
    assert shared["digests"] == [plain["digests"][0]] * 2


def test_tampering_is_noticed(shared: dict[str, Any], plain: dict[str, Any]) -> None:
    """The negative control of every comparison in these tests."""
    assert shared["digests_tampered"][0] != plain["digests"][0]
    assert shared["tokens_tampered"] != plain["tokens"]


def test_weights_stay_as_they_were_loaded(shared: dict[str, Any], plain: dict[str, Any]) -> None:
    """Every way in which vLLM can write or save weights raises on the rank that is asked, before it writes."""
    for seen in shared["ways"]["ranks"]:
        assert {name: raised for name, raised in seen.items() if not raised.startswith("DwdpError: ")} == {}
        assert {name: raised for name, raised in seen.items() if "\n" in raised or " would " not in raised} == {}
    assert {name: raised for name, raised in shared["ways"]["llm"].items() if " would " not in raised} == {}
    assert shared["ways"]["dense_kept"]
    assert shared["digests_kept"] == [plain["digests"][0]] * 2
    assert shared["tokens_kept"] == [[tokens] * 2 for tokens in plain["tokens"]]


def test_what_users_call(shared: dict[str, Any], plain: dict[str, Any]) -> None:
    seen = shared["features"]
    assert seen["n"] == [3, 3]
    assert seen["chat"] == 4
    [finished] = seen["finished_after_abort"]
    assert finished.startswith(seen["kept"])
    assert seen["choice"] in ("yes", "no")
    # Prefilled in chunks of 128; each of two ranks serves it twice, the second time from its prefix cache.
    usual = plain["features"]
    assert seen["long_prompt"] > 128
    assert seen["long_cached"][:2] == [0, 0] and min(seen["long_cached"][2:]) == usual["long_cached"][1] > 0
    assert seen["long_tokens"] == [usual["long_tokens"][i] for i in (0, 0, 1, 1)]


@pytest.mark.skipif(gpus() > 0, reason="CPU only: ranks get cores of their own")
def test_ranks_compute_on_cores_of_their_own(shared: dict[str, Any]) -> None:
    # The main thread takes one place, or all of its rank's, as the OpenMP library has it.
    assert all(set(rank["cores"]) <= set(CORES[i]) for i, rank in enumerate(shared["affinity"]))
    assert [rank["threads"] for rank in shared["affinity"]] == [len(cores) for cores in CORES]


def test_nothing_stays_after_del(shared: dict[str, Any]) -> None:
    assert shared["children_after_del"] == [] and shared["left"] == []
    assert "dwdp rank 1 stops:" in shared["log"]


@pytest.mark.parametrize("view", VIEWS)
def test_torch_compile_gives_compiled_vllms_tokens(view: str, model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"enforce_eager": False}
    # What dwdp's default is on GPUs; piecewise graphs, in plain vLLM's, compile to code that rounds otherwise.
    graphs = {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}} if gpus() else {}
    plain, shared = side_by_side(
        lambda: run_job(tmp_path, model, ["tokens"], **as_one_rank(2), **options, **graphs),
        lambda: run_job(tmp_path, model, ["tokens", "counters"], **options, **dwdp(2, weight_view=view)),
    )
    assert shared["tokens"] == plain["tokens"]
    # Compute went through the gates, also from compiled code; in the warm-up too, which is no forward of a step.
    assert all(counter["layers"] >= 4 * counter["forwards"] > 0 for counter in shared["counters"])


@pytest.mark.full
def test_as_many_experts_as_memory_allows(model: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    view = "split" if gpus() else "contiguous"
    held = dwdp(2, weight_view=view, experts_per_rank="auto")
    shared = run_job(tmp_path, model, ["tokens_each_rank", "digests", "counters"], **held)
    assert shared["tokens_each_rank"] == [[tokens] * 2 for tokens in plain["tokens"]]
    assert shared["digests"] == [plain["digests"][0]] * 2
    # The experts are small: all but one fit, which is still pulled.
    assert [counter["experts_held"] for counter in shared["counters"]] == [15, 15]
    assert all(counter["pulled_bytes"] > 0 for counter in shared["counters"])
    line = r'dwdp rank [01]: experts_per_rank "auto": 15 of 16 experts; .*\(as asked for\).* tokens; all 16 would fit'
    assert len(re.findall(line, shared["log"])) == 2


def test_ray_launches_workers(model: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    shared = run_job(tmp_path, model, ["tokens", "digests", "counters", "affinity"], **dwdp(2, launcher="ray"))
    assert shared["tokens"] == plain["tokens"]
    assert shared["digests"] == [plain["digests"][0]] * 2
    assert shared["left"] == []


@pytest.mark.full
@pytest.mark.skipif(gpus() > 0, reason="CPU only: VLLM_CPU_OMP_THREADS_BIND")
def test_user_binding_is_left_alone(model: Path, plain: dict[str, Any], tmp_path: Path) -> None:
    bind = "|".join(",".join(map(str, cores)) for cores in reversed(CORES))
    shared = run_job(tmp_path, model, ["tokens", "affinity"], env={"VLLM_CPU_OMP_THREADS_BIND": bind}, **dwdp(2))
    assert shared["tokens"] == plain["tokens"]
    assert all(set(rank["cores"]) <= set(CORES[1 - i]) for i, rank in enumerate(shared["affinity"]))
