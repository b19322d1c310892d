"""Imports of the package point one way, those for types too, and importing it loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_dwdp"
#: From what everybody may import to what nobody may; a room imports from lines above its own, and from itself.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("pure",),
    ("kernels", "transport", "predict", "compat"),
    ("prefetch", "travel", "group", "patches", "doctor"),
    ("layers", "cli"),
    ("engine",),
)
#: The two entry points, which every process of vLLM loads, and the word `dwdp` itself.
ENTRY = "__init__"


def room_of(name: str) -> str:
    """A folder of the package by its name; files beside them are the pure ones."""
    return name if name in (ENTRY, "kernels") or (PACKAGE / name).is_dir() else "pure"


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module and node.module.startswith("vllm_dwdp"):
            for name in node.names:
                inside = PACKAGE / name.name
                is_module = node.module == "vllm_dwdp" and (inside.is_dir() or inside.with_suffix(".py").exists())
                yield f"vllm_dwdp.{name.name}" if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("vllm_dwdp"))


def test_no_import_points_upward() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong, seen = [], 0
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        inside = path.relative_to(PACKAGE) if PACKAGE in path.parents else path.relative_to(ROOT)
        room = room_of(inside.parts[0].removesuffix(".py"))
        if room == ENTRY:
            continue
        for module in imports(path):
            target = room_of(module.partition(".")[2].partition(".")[0] or ENTRY)
            seen += 1
            if target not in (room, ENTRY) and floor[target] >= floor[room]:
                wrong.append(f"{inside} imports {module}")
    assert seen > 200 and wrong == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Its entry points are loaded by every process of vLLM, with dwdp or without."""
    code = (
        "import sys, vllm_dwdp, vllm_dwdp.config, vllm_dwdp.placement, vllm_dwdp.copy_plan, vllm_dwdp.transport\n"
        "import vllm_dwdp.hold, vllm_dwdp.group, vllm_dwdp.predict\n"
        "print(*sorted({'vllm', 'torch', 'cupy', 'triton', 'ray', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
