"""A kernel is searched for by Triton once, and then launched with the same arguments and constants as Triton would."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def launches(*words: str) -> list[dict[str, Any]]:
    """In a process of its own, in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("launch_twice.py")), *words]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    """By words, the two launches that were made with them, in an order in which others come between."""
    words = [f"{table},{kernel},{tokens}" for table in ("plain", "fp8") for kernel in ("pointer", "persistent")
             for tokens in (9, 16, 33)]  # fmt: skip
    words += ["biased,pointer,16", "plain,pointer,16,router", "plain,pointer,16,strided", "plain,pointer,16,float32",
              "plain,pointer,3,single", "plain,pointer,16,unaligned", "plain,persistent,16,router",
              "fp8,pointer,16,half", "plain,pointer,16,long", "plain,pointer,16,spread",
              "plain,pointer,3,single,spread"]  # fmt: skip
    told = launches(*words, *reversed(words))
    return {word: [told[i], told[-1 - i]] for i, word in enumerate(words)}


def test_a_second_launch_is_the_first_one_without_a_search(found: dict[str, list[dict[str, Any]]]) -> None:
    for word, (first, second) in found.items():
        assert first["searched"] and second["searched"] == ("unaligned" in word), word
        assert second["kernel"] == first["kernel"] and second["grid"] == first["grid"], word
        # The same but for where the activations and results lie.
        moved = [text.replace(f"at {first['a']}", f"at {second['a']}").replace(f"at {first['out']}", f"at {second['out']}")
                 for text in first["arguments"]]  # fmt: skip
        assert [text.split(" at ")[0] for text in second["arguments"]] == [text.split(" at ")[0] for text in moved], (
            word
        )
        assert second["arguments"][0].endswith(str(second["a"])), word
        assert second["arguments"][2].endswith(str(second["out"])), word


def test_what_triton_compiles_apart_is_kept_apart(found: dict[str, list[dict[str, Any]]]) -> None:
    kernels = {word: first["kernel"] for word, (first, _) in found.items()}
    # Numbers of tokens that are alike to Triton share a kernel, here as there.
    apart = [word for word in found if word.split(",")[2] not in ("9", "33")]
    assert len({kernels[word] for word in apart}) == len(apart)


def test_layers_that_are_alike_share_a_kernel() -> None:
    first, second, third = launches("plain,persistent,16", "other,persistent,16", "plain,persistent,16")
    assert first["searched"] and not second["searched"] and not third["searched"]
    # The weights' table and the lowest address are the layer's own.
    for own in (1, 25):
        assert second["arguments"][own] != first["arguments"][own] == third["arguments"][own]
    assert [a == b for a, b in zip(first["arguments"], third["arguments"], strict=True)].count(False) <= 2


def test_what_is_compiled_is_told_and_what_is_only_searched_for_is_not(found: dict[str, list[dict[str, Any]]]) -> None:
    told = [first for first, _ in found.values() if "compiled" in first]
    assert len(told) == len({first["kernel"] for first, _ in found.values()})
    assert {first["compiled"] for first in told} == {"split_gemm_kernel", "persistent_kernel"}
    assert not any("compiled" in second for _, second in found.values())
    first, second, third = launches("plain,pointer,16", "plain,pointer,32", "plain,pointer,33")
    assert second["searched"] and second["kernel"] == first["kernel"] and "compiled" not in second
    assert first["compiled"] == third["compiled"] == "split_gemm_kernel"
