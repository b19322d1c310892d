"""With the plugin installed and dwdp not selected, vLLM is as if it were not; guards, and what hides the plugin.

Every scenario of plugin_probe.py runs in a fresh process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_dwdp.compat.versions import TESTED

REPO = Path(__file__).resolve().parents[2]
LIMIT_S = 120

COMPAT = ("vllm_dwdp.compat", "vllm_dwdp.compat.versions")
CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
DWDP_WORKER = "vllm_dwdp.engine.cpu_worker.DwdpCPUWorker"
REFUSED_BY_VLLM = "ValueError: LLM(data_parallel_size=2) is not supported for single-process usage"

#: All plugins but this one; vLLM brings some of its own.
OTHERS = ",".join({point.name for point in entry_points(group="vllm.general_plugins")} - {"dwdp"})
SCENARIOS: dict[str, dict[str, str]] = {
    "plain": {},
    "plain without": {"VLLM_PLUGINS": OTHERS},
    "selected": {},
    "offline": {},
    "late": {},
    "built_first": {},
    "broken_import": {},
    "target_device": {"VLLM_TARGET_DEVICE": "cpu"},
    "hidden": {"VLLM_PLUGINS": OTHERS},
    "other_version": {},
    "other_signature": {},
    "other_seam": {},
}

Found = Callable[[str], dict[str, Any]]


def probe(name: str, model: Path) -> dict[str, Any]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "DWDP_", "RAY_"))}
    # A launch whose KV caches have no size may be refused for want of memory.
    more = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPO),
    }
    more |= SCENARIOS[name]
    command = [sys.executable, "-m", "tests.unit.plugin_probe", name.split()[0], str(model)]
    done = subprocess.run(command, cwd=REPO, env={**kept, **more}, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(tiny_moe: Path, request: pytest.FixtureRequest) -> Iterator[Found]:
    """What a scenario found. Two at a time: each is little more than an import of vLLM."""
    here = sum(item.path == request.path for item in request.session.items)
    with ThreadPoolExecutor(2) as pool:
        # A test that runs alone waits for its own only.
        early = SCENARIOS if here > 2 else ()
        started: dict[str, Future[dict[str, Any]]] = {name: pool.submit(probe, name, tiny_moe) for name in early}

        def result(name: str) -> dict[str, Any]:
            if name not in started:
                started[name] = pool.submit(probe, name, tiny_moe)
            return started[name].result()

        yield result
        pool.shutdown(cancel_futures=True)


def test_importing_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, vllm_dwdp, vllm_dwdp.patches, vllm_dwdp.patches.llm_init\n"
        "print(*[name for name in ('torch', 'vllm', 'cupy', 'ray', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_only_two_symbols_differ_from_a_vllm_without_the_plugin(found: Found) -> None:
    here, without = found("plain"), found("plain without")
    assert len(here["symbols"]) > 20_000
    assert set(here["symbols"]) == set(without["symbols"])
    differ = {name for name, seen in here["symbols"].items() if seen != without["symbols"][name]}
    assert differ == {
        "vllm.engine.arg_utils.EngineArgs.create_engine_config",
        "vllm.entrypoints.llm.LLM.__init__",
    }
    # Among those that are compared:
    for name in (
        "vllm.platforms.interface.Platform.is_tpu",
        "vllm.v1.engine.core_client.EngineCoreClient.make_client",
        "vllm.model_executor.custom_op.op_registry_oot",
        "vllm.model_executor.model_loader._LOAD_FORMAT_TO_MODEL_LOADER",
    ):
        assert name in here["symbols"]
    assert here["symbols"]["vllm.model_executor.custom_op.op_registry_oot"] == "keys []"


def test_nothing_of_ours_is_imported_but_the_wrappers(found: Found) -> None:
    wrappers = ["vllm_dwdp.patches.engine_args", "vllm_dwdp.patches.llm_init"]
    assert found("plain")["ours"] == ["vllm_dwdp", *COMPAT, "vllm_dwdp.patches", *wrappers]
    assert found("plain without")["ours"] == []
    assert found("plain")["environment"] == [x for x in found("plain without")["environment"] if x != "VLLM_PLUGINS"]
    assert found("plain")["hash"] == found("plain without")["hash"]


def test_the_early_hook_is_one_shot(found: Found) -> None:
    assert found("plain")["hook"] == [True, False]
    assert found("plain without")["hook"] == [False, False]


def test_selecting_dwdp_wraps_three_symbols_more(found: Found) -> None:
    assert found("selected")["changed"] == [
        "vllm.v1.engine.core_client.EngineCoreClient.make_client",
        "vllm.v1.engine.utils.CoreEngineProcManager.__init__",
        "vllm.v1.engine.utils.CoreEngineProcManager.monitor_engine_liveness",
    ]


def test_installing_again_changes_nothing(found: Found) -> None:
    assert found("selected")["changed_again"] == []
    assert not found("selected")["hook"]


def test_compile_caches_are_apart(found: Found) -> None:
    """vLLM names them by this hash: the same for the same options, another one than that of plain vLLM."""
    seen = found("selected")
    first, second = seen["hashes"]
    assert first == second
    assert len({first, seen["plain_hash"], seen["other_hash"]}) == 3
    assert seen["plain_hash"] == found("plain")["hash"]


def test_offline_only_dwdp_gets_past_the_check_of_data_parallel_size(found: Found) -> None:
    plain, first, second, plain_again, one, one_rank = found("offline")["errors"]
    assert plain.startswith(REFUSED_BY_VLLM)
    assert plain_again == plain
    assert (first, second, one) == (
        f"RuntimeError: {DWDP_WORKER}",
        f"RuntimeError: {DWDP_WORKER}",
        f"RuntimeError: {CPU_WORKER}",
    )
    assert one_rank.startswith("DwdpError: ") and "at least 2" in one_rank
    assert found("offline")["workers"] == [DWDP_WORKER, DWDP_WORKER, CPU_WORKER]
    assert not found("offline")["hook"]


def test_offline_where_llm_is_imported_late(found: Found) -> None:
    assert found("late")["errors"] == [f"RuntimeError: {DWDP_WORKER}"] * 2
    assert found("late")["hooks"] == [True, False]


def test_offline_where_a_config_is_built_before_llm_is_imported(found: Found) -> None:
    seen = found("built_first")
    assert seen["errors"] == [f"RuntimeError: {DWDP_WORKER}"] * 2
    assert seen["hooks"] == [True, True, False]


def test_offline_where_vllm_loads_no_platform_plugins(found: Found) -> None:
    """Documented: with VLLM_TARGET_DEVICE=cpu in the environment, `vllm_dwdp.register()` has to be called first."""
    first, registered = found("target_device")["errors"]
    assert first.startswith(REFUSED_BY_VLLM)
    assert registered == f"RuntimeError: {DWDP_WORKER}"


def test_hidden_by_vllm_plugins(found: Found) -> None:
    """vLLM's own words, which do not name the cause: the documentation does."""
    seen = found("hidden")
    assert seen["ours"] == []
    assert seen["serve"].startswith("ValidationError: ") and "not enough values to unpack" in seen["serve"]
    assert seen["offline"].startswith(REFUSED_BY_VLLM)


@pytest.mark.parametrize("way", ["dwdp", "offline"])
def test_another_vllm_is_refused_with_both_versions(found: Found, way: str) -> None:
    message = found("other_version")[way]
    assert message.startswith("DwdpError: ") and "\n" not in message
    for word in ("vLLM 0.33.1", f"vLLM {' and '.join(TESTED)}", "install the matching pair"):
        assert word in message


def test_a_failing_import_is_refused_in_one_line(found: Found) -> None:
    """Of a module that vLLM lacks; where a reason is known, nothing of ours is imported before it is told."""
    seen = found("broken_import")
    for message in seen["errors"]:
        assert message.startswith("DwdpError: dwdp cannot run on this vLLM: ") and "\n" not in message
        assert "install the matching pair" in message
    assert "vllm.v1.executor.uniproc_executor" in seen["errors"][0]
    assert "vLLM 0.33.1" in seen["errors"][1]
    assert seen["imported"] == []
    assert seen["plain"] == CPU_WORKER


def test_another_signature_is_refused_with_what_was_expected(found: Found) -> None:
    seen = found("other_signature")
    assert seen["dwdp"].startswith("DwdpError: ") and "\n" not in seen["dwdp"]
    for word in ("create_engine_config takes ['self', 'headless']", "expected ['self', 'usage_context', 'headless']"):
        assert word in seen["dwdp"]
    assert any("llm_init does not fit this vLLM" in reason for reason in seen["failures"])
    # Not a method: left alone, and said.
    assert seen["is_tpu"] == "property"
    assert "Platform.is_tpu is no longer a method without arguments" in seen["failures"]


def test_a_seam_that_does_not_fit_is_refused_before_anything_is_patched(found: Found) -> None:
    seen = found("other_seam")
    assert seen["dwdp"].startswith("DwdpError: ") and "\n" not in seen["dwdp"]
    assert "vllm.v1.engine.core_client.SyncMPClient._gone: expected a method, found nothing" in seen["dwdp"]
    assert not seen["patched"]


@pytest.mark.parametrize("name", ["other_version", "other_signature", "other_seam"])
def test_plain_vllm_goes_on_where_a_guard_fails(found: Found, name: str) -> None:
    assert found(name)["plain"] == CPU_WORKER
    assert not found(name)["hook"]
