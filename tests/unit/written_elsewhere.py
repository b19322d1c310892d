"""Every byte of experts that quantisers themselves have quantised is plain vLLM's: see ci/checks/quantisers.py.

Not collected with the others: those quantisers cannot be in vLLM's environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ci.checks.quantisers import FORMS
from tests.unit import test_methods
from tests.unit.quantised import TAKEN

if "DWDP_WRITTEN" not in os.environ:
    pytest.exit("DWDP_WRITTEN is not set: name the folder that ci.checks.quantisers has filled", returncode=2)

pytestmark = pytest.mark.usefixtures("hopper", "no_build_stays")
CASES = [(name, form, kernels) for name, form in FORMS.items() for taken, kernels in TAKEN if taken == form]


@pytest.mark.parametrize("view", ["composite", "contiguous"])
@pytest.mark.parametrize(("name", "form", "kernels"), CASES)
def test_every_byte(name: str, form: str, kernels: str, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ["DWDP_WRITTEN"]) / name

    def checkpoint(**sizes: Any) -> Path:
        return folder

    test_methods.test_every_byte_is_plain_vllms(form, kernels, view, checkpoint, monkeypatch)
