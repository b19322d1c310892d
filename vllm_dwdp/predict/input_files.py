"""TOML and JSON that users give: read with limits, so that a wrong file is one line and not a traceback or a full memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vllm_dwdp.errors import DwdpError

MOST_BYTES: Final = 8 << 20  # the largest config.json seen, which lists what is not quantised, has under 1 MiB
MOST_DEPTH: Final = 32
MOST_INTEGER: Final = 2**63  # as TOML has them


def read_toml(path: str | Path, what: str, remedy: str) -> dict[str, Any]:
    """The tables of a TOML file; raises DwdpError that says `what` it is, and the `remedy` where it cannot be read."""
    import tomllib  # Python 3.11: only the planner reads TOML

    text = _text(path, f"{what} {path}", remedy)
    try:
        raw = tomllib.loads(text)
    except RecursionError:
        raise DwdpError(f"{what} {path} is nested deeper than {MOST_DEPTH}: flatten it") from None
    except ValueError as e:  # also integers of thousands of digits
        raise DwdpError(f"{what} {path} is no valid TOML ({_first_line(e)}): correct it there") from None
    _check_values(raw, f"{what} {path}")
    return raw


def read_json(path: str | Path, remedy: str) -> Any:
    """The content of a JSON file; raises DwdpError, with the `remedy` where it is none."""
    text = _text(path, f"{path} is no readable JSON: it", remedy)
    try:
        raw = json.loads(text)
    except RecursionError:
        raise DwdpError(f"{path} is nested deeper than {MOST_DEPTH}: {remedy}") from None
    except ValueError as e:
        raise DwdpError(f"{path} is no readable JSON ({_first_line(e)}): {remedy}") from None
    _check_values(raw, str(path))
    return raw


@contextmanager
def understood(where: str) -> Iterator[None]:
    """Turn what odd values do to code that does not expect them into a DwdpError about `where` they came from."""
    try:
        yield
    except DwdpError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as e:
        raise DwdpError(f"{where} is not understood ({type(e).__name__}: {_first_line(e)}): check its types") from e


def _text(path: str | Path, what: str, remedy: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)  # of a device there is no end
        if len(content) > MOST_BYTES:
            raise DwdpError(f"{what} has more than {MOST_BYTES >> 20} MiB: {remedy}")
        return content.decode()
    except OSError as e:
        raise DwdpError(f"{what} cannot be read ({e.strerror}): {remedy}") from None
    except UnicodeDecodeError as e:
        raise DwdpError(f"{what} is no valid TOML or JSON (byte {e.start} is no UTF-8): {remedy}") from None


def _check_values(raw: Any, what: str) -> None:
    """Refuse what no field can mean, and what could not even be shown in an error."""
    level, depth = [raw], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise DwdpError(f"{what} is nested deeper than {MOST_DEPTH}: flatten it")
        for value in level:
            if isinstance(value, int) and not -MOST_INTEGER <= value < MOST_INTEGER:
                raise DwdpError(f"{what} has a whole number of {value.bit_length()} bits: 64 are the most")
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
