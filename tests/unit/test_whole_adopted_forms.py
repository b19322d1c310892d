"""A rank that returns builds each layer with one expert, in whatever form vLLM leaves it, and its kernels are given every
byte that plain vLLM's are. On the simulated device; kernels do not run here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")


from tests.unit.cuda_pair import LIMIT_S
from tests.unit.fake_cuda import Machine
from tests.unit.gpu_sharing import MANY, Group, Meeting, share_on_gpus
from tests.unit.quantised import EXPERTS, FLASHINFER, RANKS, TAKEN, plain_of, rank_of, sizes
from tests.unit.test_methods import as_bytes, kept
from tests.unit.whole_model import Loaded, expert_layers
from vllm_dwdp.layers.build import BuildApart
from vllm_dwdp.transport.base import Handle
from vllm_dwdp.transport.kept import KeptSlab, keep_slab

#: With static scales, and in NVFP4, ranks do not come and go.
FORMS = [taken for taken in (*TAKEN, *FLASHINFER) if "static" not in taken[0] and "nvfp4" not in taken[0]]
#: One of each method and kind of parameters.
QUICK = [
    ("fp8-block", "triton"), ("fp8-tensor", "marlin"), ("gptq-int4", "marlin"), ("ct-int4-zeros", "marlin"),
    ("ct-w8a8", "triton"), ("mxfp4", "marlin"), ("ct-mxfp4", "marlin"), ("online-fp8-block", "marlin"),
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("hopper", "no_build_stays")


class Life:
    """Two ranks of a model in the contiguous view, of which the second dies and returns."""

    def __init__(self, folder: Path, form: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.form, self.kernels, self._monkeypatch = folder, form, kernels, monkeypatch
        self.held: dict[int, dict[int, list[dict[str, Any]]]] = {}
        self.group = Group(Machine(), Meeting(RANKS), [])
        self.whole = [self.load(rank, None) for rank in range(RANKS)]
        self.share(self.whole)

    def load(self, rank: int, adopted: list[KeptSlab] | None, folder: Path | None = None) -> Loaded:
        apart = BuildApart(adopted, 1, adopted is None, lambda held: self.held.update({rank: held}), lambda files: None)
        return rank_of(folder or self.folder, rank, self.kernels, "contiguous", self.form, apart=apart)

    def share(self, loaded: list[Loaded]) -> None:
        builds = [each.build for each in loaded]
        share_on_gpus(self._monkeypatch, "contiguous", builds=builds, group=self.group)
        for rank in self.group.ranks[-len(builds) :]:
            rank.sharing.start()

    def kill(self) -> list[KeptSlab]:
        """The second, and what the first has open of it."""
        dead = self.group.ranks.pop()
        self.group.machine.drain()
        dead.sharing.close()
        return [keep_slab(Handle.from_dict(handle), "an adopted slab", LIMIT_S) for handle in self.held[0][1]]


@pytest.mark.parametrize(
    ("form", "kernels"),
    [pytest.param(*taken, marks=() if taken in QUICK else pytest.mark.full) for taken in FORMS],
)
def test_one_expert_is_built_and_all_are_there(
    form: str, kernels: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(**sizes(form))
    plain = list(expert_layers(plain_of(folder, form, kernels).model).values())
    life = Life(folder, form, kernels, monkeypatch)
    adopted = life.kill()
    one = life.load(1, adopted)
    share = one.build.layers[0].placement.shares[1]
    assert len(share) == 3
    for layer, whole in zip(one.build.layers, plain, strict=True):
        expected = dict(whole.named_parameters())
        for name, parameter in layer.module.named_parameters():
            assert as_bytes(parameter) == as_bytes(expected[name][share[0]]), name
            assert parameter.nbytes * EXPERTS == expected[name].nbytes, name
    life.share([one])
    for rank in life.group.ranks:
        for number, (module, whole) in enumerate(zip(rank.modules, plain, strict=True)):
            assert module.local_num_experts == module.moe_config.num_local_experts == EXPERTS  # type: ignore[attr-defined]
            assert module.dwdp_gate is not None
            module.dwdp_gate.acquire(number, MANY)
            life.group.machine.drain()
            expected = dict(whole.named_parameters())
            found = dict(module.named_parameters())
            assert list(found) == list(expected)
            for name, parameter in found.items():
                assert (parameter.shape, parameter.dtype) == (expected[name].shape, expected[name].dtype), name
                assert as_bytes(parameter) == as_bytes(expected[name]), name
            assert kept(module) == kept(whole)
            module.dwdp_gate.release(number, MANY)
        rank.sharing.close()
