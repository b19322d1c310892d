"""The documents, and the list of mutants, name tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("vllm_dwdp/**/*.md"),
    ROOT / "ci/checks/mutants.toml",
]


def names_in(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_cited_exists() -> None:
    tests = {name: names_in(path) for name, path in FILES.items()}
    every = {test for names in tests.values() for test in names}
    cited, wrong = 0, []
    for document in DOCUMENTS:
        text = document.read_text()
        for file, test in re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", text):
            cited += 1
            if file not in tests or (test and test not in tests[file]):
                wrong.append(f"{document.relative_to(ROOT)}: {file}::{test}")
        # Without a file: a test of any, or a file without its ending.
        for name in re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", text):
            cited += 1
            if name not in every and f"{name}.py" not in tests:
                wrong.append(f"{document.relative_to(ROOT)}: {name}")
    assert cited > 150 and wrong == []
