"""Made checkpoints in the forms of compressed-tensors: names, types and shapes are what that library writes, values what it
reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("compressed_tensors")

import torch
from compressed_tensors.compressors.base import BaseCompressor, compress_module
from compressed_tensors.quantization import QuantizationScheme, initialize_module_for_quantization
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from ci.checks import quantisers
from examples.checkpoints.quantised import FORMS

LIBRARY = [form for form in FORMS if form.startswith("ct-")]
OUTPUTS, INPUTS = 128, 256
#: Largest difference of what is read, in BF16, beside the largest weight: a step, or of floating point its coarsest half.
ERRORS = {"fp8": 0.07, "int4": 0.08, "int8": 0.008, "w8a8": 0.008, "fp4": 0.26}


def scheme_of(form: str) -> QuantizationScheme:
    return QuantizationScheme(**FORMS[form].config["config_groups"]["group_0"])


def written(matrix: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """What the library makes of a linear layer, its scales from the weights' own ranges; those of inputs are 1."""
    weights = scheme.weights
    assert weights is not None
    layer: Any = torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=matrix.dtype)
    layer.weight.data.copy_(matrix)
    initialize_module_for_quantization(layer, scheme)
    rows, columns = weights.block_structure or (
        OUTPUTS if weights.strategy == "tensor" else 1,
        weights.group_size or INPUTS,
    )
    blocks = matrix.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    given = {}
    if (whole := getattr(layer, "weight_global_scale", None)) is not None:
        whole.data.copy_(generate_gparam(matrix.amin(), matrix.amax()))
        given = {"global_scale": whole.data}
    scale, zero = calculate_qparams(low, high, weights, **given)
    layer.weight_scale.data = scale.reshape(layer.weight_scale.shape).to(layer.weight_scale.dtype)
    layer.weight_zero_point.data = zero.reshape(layer.weight_zero_point.shape).to(layer.weight_zero_point.dtype)
    for name in ("input_scale", "input_global_scale"):
        if hasattr(layer, name):
            getattr(layer, name).data.fill_(1)
    compress_module(layer)
    return dict(layer.state_dict())


def kinds(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """The library compiles what packs four bits, for seconds each time."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", LIBRARY)
def test_the_library_writes_the_same_and_reads_it(form: str, dtype: torch.dtype) -> None:
    matrix = (torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    scheme, mine = scheme_of(form), FORMS[form].pack(matrix, 0)
    theirs = written(matrix, scheme)
    assert kinds(mine) == kinds(theirs)
    library = BaseCompressor.get_value_from_registry(FORMS[form].config["format"])
    read = library.decompress(dict(mine), scheme)["weight"].float()
    apart = float((read - matrix.float()).abs().max() / matrix.float().abs().max())
    assert 0 < apart < next(error for word, error in ERRORS.items() if word in form)


def test_quantisers_are_asked_for_all_forms_that_they_write() -> None:
    """Else their checkpoints would be compared with nothing."""
    assert {form for form in quantisers.FORMS.values() if form.startswith("ct-")} == set(LIBRARY)
    assert set(quantisers.FORMS.values()) - set(LIBRARY) == {"gptq-int4", "gptq-int8", "awq-int4"} <= set(FORMS)


def test_an_environment_without_quantisers_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantisers, "_NEEDED", ("transformers", "no_such_quantiser"))
    monkeypatch.setattr(sys, "argv", ["quantisers", str(tmp_path / "made")])
    with pytest.raises(SystemExit, match="2"):
        quantisers.main()
    assert "lacks no_such_quantiser: use an environment with" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_that_was_cut_off_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def write(name: str, source: Path, folder: Path) -> None:
        folder.mkdir()
        written.append(name)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(quantisers, "_NEEDED", ())
    monkeypatch.setattr(quantisers, "_write", write)
    monkeypatch.setattr(sys, "argv", ["quantisers", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        quantisers.main()
    assert quantisers.main() == 0
    assert written == [*list(quantisers.FORMS)[:2], *list(quantisers.FORMS)[1:]]
    assert {path.name for path in tmp_path.iterdir()} == {"bf16", *quantisers.FORMS}
