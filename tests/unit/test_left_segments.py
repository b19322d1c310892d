"""What counts as left behind in /dev/shm: names that came since and that no process maps any more."""

from __future__ import annotations

import mmap
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ci.bench import returns_servers
from ci.checks import chaos, soak
from ci.checks.soak_processes import segments, unused


@pytest.fixture
def names() -> Iterator[tuple[set[str], str, str]]:
    """Names that were there before, one of somebody who uses it, and one that nobody maps."""
    before = segments()
    paths = []
    for _ in range(2):
        descriptor, path = tempfile.mkstemp(prefix="dwdp-test-", dir="/dev/shm")
        os.ftruncate(descriptor, 4096)
        paths.append((descriptor, path))
    with mmap.mmap(paths[0][0], 4096):
        for descriptor, _ in paths:
            os.close(descriptor)
        yield before, Path(paths[0][1]).name, Path(paths[1][1]).name
    for _, path in paths:
        os.unlink(path)


def by_soak(before: set[str], tmp_path: Path) -> list[str]:
    server = object.__new__(soak.Server)
    server.shm_before, server.temporary = before, tmp_path
    server.process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    return server.stop()


def by_returns(before: set[str], tmp_path: Path) -> list[str]:
    left = returns_servers.Left()
    left.segments = before
    return left.look()


def by_chaos(before: set[str], tmp_path: Path) -> list[str]:
    return chaos.left([], before, tmp_path)


@pytest.mark.parametrize(("look", "word"), [(by_soak, ""), (by_returns, "segment "), (by_chaos, "segment ")])
def test_what_others_use_was_not_left(
    look: Callable[[set[str], Path], list[str]],
    word: str,
    names: tuple[set[str], str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(returns_servers, "_LEFT_LIMIT_S", 0.0)
    monkeypatch.setattr(chaos, "LEFT_LIMIT_S", 0.0)
    before, used, free = names
    found = look(before, tmp_path)
    assert f"{word}{free}" in found and f"{word}{used}" not in found


def test_nothing_and_what_went_meanwhile() -> None:
    assert unused(set()) == [] and unused({"dwdp-test-that-is-not-there"}) == []


def test_whatever_others_map(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff"
    with open(path, "wb+") as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096):
            assert unused({"dwdp-test-that-is-not-there"}) == []
