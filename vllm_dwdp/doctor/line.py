"""A line of the doctor: what was looked at, how it is, and what to do where it is not well (pure)."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "warning", "failure"]
_COLUMNS = 110
_INDENT = 27


@dataclass(frozen=True)
class Line:
    """name: what was looked at. text: what was found. remedy: what to do; empty where all is well, and only there."""

    name: str
    state: State
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert (self.state == "ok") == (not self.remedy), self


def ok(name: str, text: str) -> Line:
    return Line(name, "ok", text)


def warning(name: str, text: str, remedy: str) -> Line:
    return Line(name, "warning", text, remedy)


def failure(name: str, text: str, remedy: str) -> Line:
    return Line(name, "failure", text, remedy)


def guarded(name: str, check: Callable[[], Line | Sequence[Line]]) -> list[Line]:
    """The lines of `check`; whatever it raises is a failure by that name, so that the others are looked at all the same."""
    try:
        found = check()
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return [failure(name, f"could not be looked at ({what})", "please report this line")]
    return [found] if isinstance(found, Line) else list(found)


def summary(lines: Sequence[Line]) -> str:
    count = Counter(line.state for line in lines)
    words = [f"{count[state]} {state}{'s' * (count[state] != 1)}" for state in ("warning", "failure")]
    return ", ".join([f"{count['ok']} ok", *words])


def shown(lines: Sequence[Line]) -> str:
    """For a terminal: state, name, text, and the remedy below."""
    parts = []
    for line in lines:
        text = f"{line.state:7}  {line.name:16}  {line.text}"
        parts.append(textwrap.fill(text, _COLUMNS, subsequent_indent=" " * _INDENT, break_on_hyphens=False))
        if line.remedy:
            parts.append(
                textwrap.fill(
                    f"-> {line.remedy}", _COLUMNS, initial_indent=" " * _INDENT, subsequent_indent=" " * (_INDENT + 3),
                    break_on_hyphens=False, break_long_words=False,
                )
            )  # fmt: skip
    return "\n".join([*parts, summary(lines)])


def as_json(lines: Sequence[Line]) -> str:
    """The same for programs: `lines`, and the number of each state."""
    count = Counter(line.state for line in lines)
    states = {state: count[state] for state in ("ok", "warning", "failure")}
    return json.dumps({"lines": [asdict(line) for line in lines], **states}, indent=2)


def exit_status(lines: Sequence[Line]) -> int:
    """1 where something failed, else 0; warnings are no failures."""
    return int(any(line.state == "failure" for line in lines))
