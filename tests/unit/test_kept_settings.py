"""Settings of vLLM that still count where the plugin does what vLLM would have done (vllm_dwdp/patches/README.md)."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from safetensors.torch import save_file
from torch import zeros
from vllm.config.load import LoadConfig

from tests.unit.leftovers import build
from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.engine import configure
from vllm_dwdp.engine.loader import ShareOnlyLoader
from vllm_dwdp.group.launch import DwdpLaunch, attach_launch, launch_of


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("disabled", [False, True])
def test_log_statistics(disabled: bool, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[bool] = []
    monkeypatch.setattr(
        configure, "watch_ranks", lambda config, launch, publishing, summarise: published.append(publishing)
    )
    build(tiny_moe, disable_log_stats=disabled)
    assert published == [not disabled]


@pytest.mark.parametrize("shown", [False, True])
def test_progress_bar_of_fused_experts(shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"layers.0.mlp.experts.gate_up_proj": zeros(4, 2, 2)}, tmp_path / "model.safetensors")
    loader = ShareOnlyLoader(LoadConfig(load_format="auto", use_tqdm_on_load=shown))
    loader.local_expert_ids, loader._expert_by_expert, loader._by_layer = {0, 1}, False, {}
    assert len(list(loader._share_of([str(tmp_path / "model.safetensors")], {4}))) == 1
    assert ("this rank's share" in capsys.readouterr().err) is shown


@pytest.mark.parametrize(("ranks_per_device", "asked"), [(1, 0.5), (2, 0.25)])
def test_gpus_of_a_ray_worker(ranks_per_device: int, asked: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from vllm_dwdp.engine import ray_executor

    monkeypatch.setenv("VLLM_RAY_PER_WORKER_GPUS", "0.5")
    monkeypatch.setattr(ray_executor, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace())
    attach_launch(config, DwdpLaunch(DwdpConfig(ranks_per_device=ranks_per_device), 2, "/tmp/dwdp-launch", ()))
    made: Any = object.__new__(ray_executor.DwdpRayExecutor)
    made.vllm_config = config
    assert made._get_actor_resource_kwargs() == {"num_gpus": asked}


@pytest.mark.usefixtures("nothing_left")
def test_compiled_code_is_found_again_wherever_a_group_meets(tiny_moe: Path, tmp_path: Path) -> None:
    """And whatever else no compiled code sees; vLLM's folder is that of one server of a group alone."""

    def hashed(**settings: Any) -> str:
        apart = {"group": "g", "rank": 0, "ranks": 2, "meet": str(tmp_path)} | settings
        config = build(tiny_moe, data_parallel_size=1, additional_config={"dwdp": apart, "other": {"key": 1}})
        assert config.additional_config["other"] == {"key": 1}
        hashes.append(config.compute_hash())
        return str(hashes[-1])

    hashes: list[str] = []
    (tmp_path / "elsewhere").mkdir()
    first, path = hashed(), str(tmp_path / "hits.json")
    assert first == hashed(meet=str(tmp_path / "elsewhere")) == hashed(timeout_s=7.0) == hashed(trace=True)
    counting = hashed(hits=path)
    assert counting == hashed(hits=path + "on")
    others = [hashed(**settings) for settings in ({"rank": 1}, {"group": "h"}, {"ranks": 3}, {"num_slots": 3})]
    assert len({first, counting, hashed(weight_view="contiguous"), *others}) == 7


def test_why_ranks_share_no_compiled_code(tmp_path: Path) -> None:
    """vLLM writes the index of a cache where it is read, and ends where it reads half of it."""
    from vllm.compilation.backends import CompilerManager
    from vllm.config import CompilationConfig
    from vllm.config.utils import Range

    def manager() -> CompilerManager:
        made = CompilerManager(CompilationConfig(backend="inductor"))
        made.initialize_cache(str(tmp_path))
        return made

    first = manager()
    first.cache = {(Range(1, 2), 0, "inductor"): {"graph_handle": ("a", "b"), "cache_key": "c"}}
    first.is_cache_updated = True
    first.save_to_file()
    index = tmp_path / "vllm_compile_cache.py"
    inode, whole = index.stat().st_ino, index.read_text()
    first.save_to_file()
    assert index.stat().st_ino == inode, "it is replaced as a whole: ranks may share it"
    assert manager().cache == first.cache
    index.write_text(whole[: len(whole) // 2])
    with pytest.raises(SyntaxError):
        manager()


def test_whatever_is_new_names_the_caches_of_compiled_code() -> None:
    """All settings but these: a cache that is shared by mistake computes wrong results."""
    settings = DwdpConfig()
    assert settings.to_dict().keys() - settings.compiled_by().keys() == {"meet", "timeout_s", "trace"}
    assert settings.to_dict() | settings.compiled_by() == {**settings.to_dict(), "hits": False}


@pytest.mark.usefixtures("nothing_left")
def test_arguments_are_as_they_were_once_a_config_is_built(tiny_moe: Path, tmp_path: Path) -> None:
    """What names the caches is not what a launch reads: `hits` would be a truth value, and not a path."""
    from vllm.engine.arg_utils import EngineArgs

    told: dict[str, Any] = {"dwdp": {"hits": str(tmp_path / "hits.json"), "timeout_s": 7.0}, "other": 1}
    arguments = EngineArgs(
        model=str(tiny_moe), distributed_executor_backend="dwdp", data_parallel_size=2, additional_config=told
    )
    for _ in range(2):
        config = arguments.create_engine_config()
        assert config.additional_config["dwdp"]["hits"] is True and arguments.additional_config is told
        launch = launch_of(pickle.loads(pickle.dumps(config)))
        assert launch is not None and (launch.config.hits, launch.config.timeout_s) == (told["dwdp"]["hits"], 7.0)
