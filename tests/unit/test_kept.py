"""A kernel object that keeps an alias of a parameter's data: auto takes the view in which that stays right."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.unit.gpu_layers import LAYERS, SHAPES, Kernel
from tests.unit.gpu_sharing import share_on_gpus
from vllm_dwdp.layers import gates
from vllm_dwdp.layers.views import split

SAID = "dwdp: view contiguous instead of composite, since Method keeps layer0.w2_weight in a tensor of its own"


def keeping(kept: str) -> type[Kernel]:
    """A kernel object that keeps this of w2_weight, or something else."""

    class Keeping(Kernel):
        def __init__(self, layer: Any) -> None:
            super().__init__(layer)
            parameter = layer.w2_weight
            found = {"alias": parameter.data.view(-1), "slice of it": parameter.data[1:], "parameter": parameter}
            self.config = SimpleNamespace(scales={"w2": found.get(kept, layer.w13_bias.data.clone())})

    return Keeping


def kept_in_config(method: Any, layer: Any) -> None:
    """vLLM's config of a quantised form has scales, of which a kernel may be given what is there when it is made."""
    method.moe_kernel, method.moe_quant_config = Kernel(layer), SimpleNamespace(w2=layer.w2_weight.data)


@pytest.mark.usefixtures("no_build_stays")
@pytest.mark.parametrize("kept", ["alias", "slice of it", "in the config", "parameter", "copy of another", "nothing"])
def test_auto_takes_the_contiguous_view_for_an_alias(
    kept: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tests.unit.gpu_layers.Kernel", Kernel if kept == "nothing" else keeping(kept))
    if kept == "in the config":
        monkeypatch.setattr("tests.unit.gpu_layers.Method._init_moe_kernel", kept_in_config)
    monkeypatch.setattr(split, "why_not", lambda layer: "are in another form")
    monkeypatch.setattr("tests.unit.fake_vmm.PAGE", 4096)
    logger = logging.getLogger("vllm.dwdp")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)
    aliases = kept in ("alias", "slice of it", "in the config")
    machine, ranks = share_on_gpus(monkeypatch, "auto", direct_tokens=0 if aliases else 16)
    assert [rank.sharing.view for rank in ranks] == ["contiguous" if aliases else "composite"] * 2
    # Each rank is a process, and says so once.
    assert [record.getMessage() for record in caplog.records if record.name == logger.name] == [SAID] * 2 * aliases
    for rank in ranks:
        rank.sharing.start()
        rank.forward()
        machine.drain()
        assert (rank.compared, rank.wrong) == (LAYERS * len(SHAPES), 0)
        rank.sharing.close()
    gates._gates.clear()


@pytest.mark.usefixtures("no_build_stays")
@pytest.mark.parametrize(
    ("page", "settings"), [(4096, {"transport": "cupy_ipc"}), (1 << 21, {})], ids=["transport", "pages too large"]
)
def test_nothing_is_said_of_a_composite_view_that_is_not_there(
    page: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tests.unit.gpu_layers.Kernel", keeping("alias"))
    monkeypatch.setattr(split, "why_not", lambda layer: "are in another form")
    monkeypatch.setattr("tests.unit.fake_vmm.PAGE", page)
    logger = logging.getLogger("vllm.dwdp")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger.name)
    _, ranks = share_on_gpus(monkeypatch, "auto", direct_tokens=0, **settings)
    assert [rank.sharing.view for rank in ranks] == ["contiguous"] * 2
    assert not [record for record in caplog.records if record.name == logger.name]
    for rank in ranks:
        rank.sharing.close()
    gates._gates.clear()
