"""The table of what is used of vLLM is complete, holds for the vLLM that is installed, and is checked before a launch."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_dwdp.compat.seams import SEAMS, Seam, check, misfits
from vllm_dwdp.compat.sources import Sources

REPO = Path(__file__).resolve().parents[2]
FILES = [*sorted((REPO / "vllm_dwdp").rglob("*.py")), *sorted((REPO / "kernels").glob("*.py"))]

#: Private names that are not vLLM's: of Python and of torch, and what a class of ours has from another.
OTHERS = {
    "_replace",
    "_asdict",
    "_getframe",
    "_qsize",
    "_get_help_string",
    "_foreach_copy_",
    "_cuda_getCurrentRawStream",
    "_C",
    "_fields",
    "_make",
    "_pull",  # ours: prefetch/trace.py stands in front of the prefetcher
}

#: Classes of ours that stand in front of a class of vLLM which is not among their bases.
IN_FRONT_OF = {
    "DwdpWorkerMixin": "vllm.v1.worker.gpu_worker.Worker",
    "DwdpExpertsMixin": "vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts",
    "_ShareOnlyMixin": "vllm.model_executor.model_loader.default_loader.DefaultModelLoader",
}
#: Read by name and set again on `self`; nothing of vLLM is replaced.
ANNOTATED = {"vllm_config", "model_runner", "parameters"}

IN_TABLE = {seam.name.rsplit(".", 1)[1] for seam in SEAMS} | {name for seam in SEAMS for name in seam.attributes}


def vllm_root() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    return Path(spec.origin).parents[1]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and not name.startswith("__")


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a module of ours defines for itself."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            yield ast.literal_eval(node.args[1]) if isinstance(node.args[1], ast.Constant) else ""


def members_of(node: ast.ClassDef) -> Iterator[str]:
    """Names that a class of ours defines in its body or sets on `self`."""
    for inner in node.body:
        yield from [inner.name] if isinstance(inner, ast.FunctionDef) else []
        for target in inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]:
            yield from [target.id] if isinstance(target, ast.Name) else []
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == "self":
            yield inner.attr


def foreign(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names that a module reads and that nothing of ours defines, or that it reads of `super()`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own or ast.unparse(node.value) == "super()":
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
            yield from (alias.name for alias in node.names if is_private(alias.name))


def overridden(tree: ast.Module, sources: Sources) -> Iterator[tuple[str, str]]:
    """(class of vLLM, member) for each member that a class of ours has instead of, or sets in, a class of vLLM."""
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm.")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        bases = [imported.get(ast.unparse(base)) for base in node.bases] + [IN_FRONT_OF.get(node.name)]
        for base in filter(None, bases):
            if (found := sources.find(base)) is not None:
                members = sorted(name for name in set(members_of(node)) if sources.has_member(found, name))
                yield from ((base, name) for name in members)


def test_private_names_of_vllm_are_in_the_table() -> None:
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    own = {name for tree in trees.values() for name in defined(tree)}
    missing = {
        f"{path.relative_to(REPO)}: {name}"
        for path, tree in trees.items()
        for name in foreign(tree, own)
        if name not in IN_TABLE | OTHERS
    }
    assert missing == set()


def test_overridden_members_are_in_the_table() -> None:
    sources = Sources(vllm_root())
    found = [pair for path in FILES for pair in overridden(ast.parse(path.read_text()), sources)]
    assert len(found) > 20
    assert {pair for pair in found if pair[1] not in IN_TABLE | ANNOTATED} == set()


def test_frozen_names_are_in_the_table() -> None:
    pytest.importorskip("vllm")
    from vllm_dwdp.engine.frozen import RUNNER, WORKER

    assert {*WORKER, *RUNNER} <= IN_TABLE


def test_the_files_that_use_seams_name_them() -> None:
    for seam in SEAMS:
        assert (REPO / seam.used_by).is_file(), seam


def test_the_table_holds_for_the_installed_vllm() -> None:
    assert list(misfits(vllm_root())) == []


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_each_row_misses_what_is_gone_but_optional_ones(seam: Seam, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    line = check(seam, Sources(tmp_path))
    assert line is None if seam.optional else "found nothing" in str(line)


@pytest.mark.parametrize("seam", [seam for seam in SEAMS if seam.returns], ids=lambda seam: seam.name)
def test_what_returns_is_as_annotated(seam: Seam) -> None:
    """What a row says of a name that vLLM annotates otherwise is told; only what is annotated is in the table."""
    line = check(replace(seam, returns="Other"), Sources(vllm_root()))
    assert line == f"{seam.name}: expected Other, found {seam.returns}" or (line is None and seam.optional)


def test_what_a_wheel_changed_is_told(tmp_path: Path) -> None:
    """A parameter and a member that go, a method that is no method any more, and another result."""
    shutil.copytree(vllm_root() / "vllm", tmp_path / "vllm", ignore=lambda _, names: _no_python(names))
    for module, old, new in (
        ("v1/engine/core_client.py", "log_stats: bool,\n        renderer", "statistics: bool,\n        renderer"),
        ("v1/engine/utils.py", "failed_proc_name", "name_of_failed"),
        ("v1/executor/uniproc_executor.py", "def _distributed_args(", "def _args_of_group("),
        (
            "v1/worker/gpu_worker.py",
            "def determine_available_memory(self) -> int:",
            "def determine_available_memory(self):",
        ),
    ):
        text = (tmp_path / "vllm" / module).read_text()
        assert old in text
        (tmp_path / "vllm" / module).write_text(text.replace(old, new))
    command = [sys.executable, "-m", "ci.checks.check_seams", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *lines, last = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (1, 4), done.stdout + done.stderr
    assert last == f"4 of {len(SEAMS)} seams changed"
    assert any("make_client: expected the parameters" in line and "'log_stats'" in line for line in lines)
    assert any("CoreEngineProcManager: expected the members" in line for line in lines)
    assert any("UniProcExecutor._distributed_args: expected a method, found nothing" in line for line in lines)
    assert any("determine_available_memory: expected int, found no annotation" in line for line in lines)


def _no_python(names: list[str]) -> list[str]:
    return [name for name in names if "." in name and not name.endswith(".py")]
