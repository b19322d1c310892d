"""What vLLM looks like in a fresh process with the plugin installed; one scenario per process, for test_patches.py.

    python -m tests.unit.plugin_probe SCENARIO MODEL

prints its findings as JSON on the last line.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

Findings = dict[str, Any]


def build(model: str, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=model, **arguments).create_engine_config()


def build_dwdp(model: str, **settings: Any) -> Any:
    more = {"additional_config": {"dwdp": settings}} if settings else {}
    return build(model, distributed_executor_backend="dwdp", data_parallel_size=2, **more)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def look(value: object) -> str:
    """What would change if somebody replaced or extended `value`: where its code is, or what it holds."""
    kind = type(value)
    if kind in (staticmethod, classmethod):
        return look(value.__func__)  # type: ignore[attr-defined]
    if kind is property:
        return look(value.fget)  # type: ignore[attr-defined]
    if isinstance(value, functools._lru_cache_wrapper):
        return f"cached {look(value.__wrapped__)}"
    if kind is types.FunctionType:
        return f"{value.__code__.co_filename}:{value.__code__.co_firstlineno}"  # type: ignore[attr-defined]
    if issubclass(kind, type):
        return f"class {value.__module__}.{value.__qualname__}"  # type: ignore[attr-defined]
    if kind is dict:
        return f"keys {sorted(map(str, value))}"  # type: ignore[call-overload]
    if kind in (list, tuple, set, frozenset):
        return f"{kind.__name__} of {len(value)}"  # type: ignore[arg-type]
    return f"a {kind.__module__}.{kind.__qualname__}"


def symbols() -> dict[str, str]:
    """Everything that vLLM's modules and their classes define, as far as they are imported."""
    import vllm.model_executor.custom_op
    import vllm.model_executor.model_loader
    import vllm.v1.engine.core_client  # noqa: F401

    found = {}
    for name, module in list(sys.modules.items()):
        if name != "vllm" and not name.startswith("vllm."):
            continue
        for attribute, value in list(vars(module).items()):
            found[f"{name}.{attribute}"] = look(value)
            # By the type, since vLLM's lazy modules import on isinstance.
            if issubclass(type(value), type) and value.__module__ == name:
                for member, inner in list(vars(value).items()):
                    found[f"{name}.{value.__qualname__}.{member}"] = look(inner)
    return found


def ours() -> list[str]:
    return sorted(name for name in sys.modules if name.split(".")[0] == "vllm_dwdp")


def hook_is_on() -> bool:
    from vllm.platforms.interface import Platform

    return "vllm_dwdp" in Platform.is_tpu.__code__.co_filename


def plain(model: str) -> Findings:
    """`dwdp` is not selected. Run with and without the plugin."""
    from vllm import LLM  # noqa: F401
    from vllm.plugins import load_general_plugins

    before = hook_is_on()
    load_general_plugins()
    config = build(model)
    return {
        "hook": [before, hook_is_on()],
        "ours": ours(),
        "symbols": symbols(),
        "environment": sorted(name for name in os.environ if name.startswith(("VLLM", "DWDP", "RAY"))),
        "hash": config.compute_hash(),
    }


def selected(model: str) -> Findings:
    """First not selected, then selected."""
    from vllm import LLM  # noqa: F401

    plain_hash, before = build(model).compute_hash(), symbols()
    hashes = [build_dwdp(model).compute_hash(), build_dwdp(model).compute_hash()]
    other = build_dwdp(model, num_slots=3).compute_hash()
    after = symbols()
    import vllm_dwdp

    vllm_dwdp.early()
    vllm_dwdp.early()
    vllm_dwdp.register()
    vllm_dwdp.register()
    again = symbols()
    return {
        "changed": sorted(name for name in before if after[name] != before[name]),
        "changed_again": sorted(name for name in after if again[name] != after[name]),
        "hook": hook_is_on(),
        "plain_hash": plain_hash,
        "hashes": hashes,
        "other_hash": other,
    }


DWDP = {"distributed_executor_backend": "dwdp", "data_parallel_size": 2}


def stop_at_config() -> list[str]:
    """From here on `LLM` ends with the worker class of its config, which the returned list also gets."""
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    workers: list[str] = []

    def stop(engine_args: Any, **_: Any) -> None:
        # The hook answers one caller only.
        assert not current_platform.is_tpu()
        workers.append(engine_args.create_engine_config().parallel_config.worker_cls)
        raise RuntimeError(workers[-1])

    LLMEngine.from_engine_args = stop  # type: ignore[method-assign, assignment]
    return workers


def offline(model: str) -> Findings:
    """`LLM` several times in one process: only the early hook can let the first of dwdp through, a wrapper the next."""
    from vllm import LLM

    workers = stop_at_config()
    attempts: list[dict[str, Any]] = [
        {"data_parallel_size": 2},
        DWDP,
        DWDP,
        {"data_parallel_size": 2},
        {},
        {**DWDP, "data_parallel_size": 1},
    ]
    errors = [error_of(lambda: LLM(model, **arguments)) for arguments in attempts]  # noqa: B023
    return {"errors": errors, "workers": workers, "hook": hook_is_on()}


def late(model: str) -> Findings:
    """`LLM` is imported after the plugins are loaded, as in a program that builds engine arguments first."""
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(model=model)
    hooks = [hook_is_on()]
    from vllm import LLM

    stop_at_config()
    errors = [error_of(lambda: LLM(model, **DWDP)) for _ in range(2)]
    return {"errors": errors, "hooks": [*hooks, hook_is_on()]}


def built_first(model: str) -> Findings:
    """A config, of plain vLLM, is built before `LLM` is imported: by its module, late."""
    hooks = []
    build(model)
    hooks.append(hook_is_on())
    build(model)
    hooks.append(hook_is_on())
    from vllm.entrypoints.llm import LLM

    stop_at_config()
    errors = [error_of(lambda: LLM(model, **DWDP)) for _ in range(2)]
    return {"errors": errors, "hooks": [*hooks, hook_is_on()]}


def broken_import(model: str) -> Findings:
    """Modules of vLLM that dwdp needs are not there: first found out, then known before, as with another release."""
    build(model)
    from vllm_dwdp.patches import failures, refuse

    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise ImportError(f"cannot import {name}\nfrom {self.__name__}")

    kept = {name: module for name, module in sys.modules.items() if "uniproc_executor" in name}
    sys.modules["vllm.v1.executor.uniproc_executor"] = Broken("vllm.v1.executor.uniproc_executor")
    errors = [error_of(lambda: build_dwdp(model))]
    for name in [name for name in ours() if name.startswith("vllm_dwdp.engine")]:
        del sys.modules[name]
    failures.clear()
    refuse("vLLM 0.33.1 is installed")
    errors.append(error_of(lambda: build_dwdp(model)))
    imported = [name for name in ours() if name.startswith("vllm_dwdp.engine")]
    sys.modules.update(kept)
    return {"errors": errors, "imported": imported, "plain": build(model).parallel_config.worker_cls}


def target_device(model: str) -> Findings:
    """VLLM_TARGET_DEVICE=cpu keeps vLLM from loading any platform plugin, and with them the early hook."""
    from vllm import LLM

    stop_at_config()
    errors = [error_of(lambda: LLM(model, **DWDP))]
    import vllm_dwdp

    vllm_dwdp.register()
    return {"errors": [*errors, error_of(lambda: LLM(model, **DWDP))]}


def hidden(model: str) -> Findings:
    """VLLM_PLUGINS leaves us out, and `dwdp` is asked for."""
    from vllm import LLM

    serve = error_of(lambda: build_dwdp(model))
    return {"ours": ours(), "serve": serve, "offline": error_of(lambda: LLM(model, **DWDP))}


def _refused(model: str) -> Findings:
    found = {"dwdp": error_of(lambda: build_dwdp(model)), "plain": build(model).parallel_config.worker_cls}
    from vllm import LLM

    return {**found, "hook": hook_is_on(), "offline": error_of(lambda: LLM(model, **DWDP))}


def other_version(model: str) -> Findings:
    """vLLM says that it is another release."""
    import vllm.version
    from vllm import LLM  # noqa: F401

    vllm.version.__version__ = "0.33.1+cpu"
    return _refused(model)


def other_seam(model: str) -> Findings:
    """The table of what is used of vLLM asks for something that this vLLM does not have."""
    from vllm import LLM  # noqa: F401
    from vllm.v1.engine.core_client import EngineCoreClient

    from vllm_dwdp.compat import seams

    build(model)
    seams.SEAMS = (*seams.SEAMS, seams.Seam("vllm.v1.engine.core_client.SyncMPClient._gone", "method", "here"))  # type: ignore[misc, assignment]
    return {**_refused(model), "patched": hasattr(EngineCoreClient.make_client, "_dwdp_wraps")}


def other_signature(model: str) -> Findings:
    """What we wrap takes other parameters than we know, or is something else altogether."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform  # noqa: F401
    from vllm.platforms.interface import Platform

    make = EngineArgs.create_engine_config

    def create_engine_config(self: Any, context: Any = None, *, headless: bool = False) -> Any:
        return make(self, context, headless)

    class Start:
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign, assignment]
    LLM.__init__ = Start()  # type: ignore[method-assign, assignment]
    found = _refused(model)
    from vllm_dwdp.patches import failures, llm_init

    Platform.is_tpu = property(lambda self: False)  # type: ignore[method-assign, assignment]
    llm_init.arm()
    return {**found, "failures": failures, "is_tpu": type(Platform.__dict__["is_tpu"]).__name__}


if __name__ == "__main__":
    findings = globals()[sys.argv[1]](sys.argv[2])
    print(json.dumps(findings))
