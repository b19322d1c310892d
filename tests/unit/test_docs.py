"""The documents, and the list of mutants, name tests that exist; links lead somewhere."""

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


def anchors(path: Path) -> set[str]:
    """Of the headings of a document, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_between_documents_leads_somewhere() -> None:
    followed, wrong = 0, []
    for document in DOCUMENTS:
        if document.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if "://" in target:
                continue
            file, _, anchor = target.partition("#")
            path = (document.parent / file).resolve() if file else document
            followed += 1
            if not path.exists() or (anchor and anchor not in anchors(path)):
                wrong.append(f"{document.relative_to(ROOT)}: {target}")
    assert followed > 100 and wrong == []
