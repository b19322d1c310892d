"""Every option that the documents give to one of our commands is one that this command has; read from sources, as most
commands import torch or vLLM for their help."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.unit.test_docs import DOCUMENTS, ROOT

#: What a document calls, and its options.
COMMAND = re.compile(r"(?:python3? (?:-m ([\w.]+)|(examples/\w+\.py))|vllm-dwdp (?!vllm)(\w+))\b(.*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
#: Behind it stand words for vLLM.
PASSED_ON = " --more "


def file_of(module: str) -> Path | None:
    """Of a module of ours, of which a package is run by its __main__."""
    # An editable install finds the kernels beside the package.
    path = ROOT / re.sub(r"^vllm_dwdp/kernels/", "kernels/", module.replace(".", "/"))
    found = (path.with_suffix(".py"), path / "__main__.py", path / "__init__.py")
    return next((file for file in found if file.exists()), None)


def imported(file: Path) -> Iterator[Path]:
    """Files of ours that `file` names in an import, wherever that stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            beside = file.with_name(f"{name}.py")  # examples import each other so
            if (found := beside if beside.exists() else file_of(name)) is not None:
                yield found


@cache
def options_of(file: Path) -> frozenset[str]:
    """Options that `file` has as strings, or what it imports of ours."""
    seen, ahead, options = set[Path](), [file], set[str]()
    while ahead:
        if (file := ahead.pop()) not in seen:
            seen.add(file)
            options |= set(re.findall(r'"(--[a-z][\w-]*)"', file.read_text()))
            ahead += imported(file)
    return frozenset(options)


@cache
def options_told(command: str) -> frozenset[str]:
    """Options in the help of `vllm-dwdp command`, which imports neither torch nor vLLM."""
    call = [sys.executable, "-m", "vllm_dwdp.cli", command, "--help"]
    return frozenset(OPTION.findall(subprocess.run(call, capture_output=True, text=True, check=True, cwd=ROOT).stdout))


def calls(text: str) -> Iterator[str]:
    """Lines of blocks of code, joined where they go on, and code within lines."""
    text = text.replace("\\\n", " ")
    fence = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for block in fence.findall(text):
        yield from block.splitlines()
    text = fence.sub("", text)
    yield from re.findall(r"^    \S.*$", text, re.MULTILINE)
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))


def test_commands_have_the_options_that_documents_name() -> None:
    checked, wrong = 0, []
    for document in DOCUMENTS:
        if document.suffix != ".md":
            continue
        for words in calls(document.read_text()):
            if (call := COMMAND.search(words.split("  #")[0])) is None:
                continue
            module, example, command, rest = call.groups()
            if module == "pytest":
                continue
            if command:
                known = options_told(command)
            else:
                file = ROOT / example if example else file_of(module)
                assert file is not None, f"{document.name}: there is no {module}"
                known = options_of(file)
            for option in OPTION.findall(rest.split(PASSED_ON)[0]):
                checked += 1
                if option not in known:
                    wrong.append(f"{document.relative_to(ROOT)}: {words}: {option}")
    assert checked > 100 and wrong == []


def test_an_option_that_is_gone_is_seen() -> None:
    file = file_of("ci.bench.returns")
    assert file is not None and "--plain" in options_of(file) and "--no-such-option" not in options_of(file)
    # Of a module that it imports, and of one that it does not.
    kernels = file_of("vllm_dwdp.kernels.bench")
    assert kernels is not None and "--alike" in options_of(kernels) and "--alike" not in options_of(file)
