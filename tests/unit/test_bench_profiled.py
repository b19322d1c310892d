"""ci/bench/profiled.py: what traces say that ranks' time is made of."""

from __future__ import annotations

import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ci.bench import profiled
from ci.bench.profiled_table import longest, table

#: Names as H100s' traces have them (docs/benchmarks/two-h100/prefill-link.json), and as sources of vLLM, NCCL and ours do.
NAMES = {
    "experts": [
        "fused_moe_kernel", "persistent_kernel", "split_gemm_kernel", "vllm::moe_forward",
        "_p_matmul_ogs_NNT_bf16xbf16xmxfp4_128x256x128x1_swiglu", "void marlin_moe_wna16::Marlin<__nv_bfloat16, 4>(int4)",
        "void deep_gemm::sm90_fp8_gemm_1d2d_impl<(deep_gemm::GemmType)1, MGroupedContiguous>",
    ],
    "attention": [
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloop<Softmax",
        "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, __nv_bfloat16, (vllm::Fp8KVCacheDataType)0>",
        "vllm::unified_attention_with_output", "vllm::unified_kv_cache_update", "kernel_unified_attention_2d",
    ],
    "matrix products": [
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "aten::mm", "aten::linear", "_C::onednn_mm",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>", "triton_tem_fused_mm_1",
    ],
    "collectives": [
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "c10d::allreduce_",
        "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(vllm::RankData*)", "multimem_all_reduce_kernel<float>",
    ],
    "travelling tokens": ["ask_kernel", "wait_kernel", "merge_kernel", "take_kernel", "answer_kernel"],
    "norms, routing": [
        "triton_red_fused_fused_add_rms_norm_moe_forward_0", "void vllm::moe::topkGating<8, 128, 4, 16, 32, int>",
        "void vllm::moe::moe_align_block_size_kernel<int>(int const*)", "void vllm::act_and_mul_kernel<c10::BFloat16>",
        "void vllm::moe::count_and_sort_expert_tokens_kernel<int>", "void vllm::rotary_embedding_kernel<c10::BFloat16>",
        "void vllm::moe::moe_sum_vec_kernel<c10::BFloat16, int, 8, false>", "void flashinfer::norm::RMSNormKernel<8>",
    ],
    "copies": ["Memcpy HtoD (Pinned -> Device)", "Memset (Device)", "memcpy128"],
    "other": ["void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>", "_gumbel_sample_kernel"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_names_have_their_kind(kind: str, name: str) -> None:
    assert profiled.kind_of(name) == kind and kind in profiled.KINDS


def ran(name: str, begin: float, end: float, stream: int = 7, cat: str = "kernel") -> dict[str, Any]:
    """An event from `begin` to `end` ms after the trace's base."""
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": stream, "ts": begin * 1e3, "dur": (end - begin) * 1e3}


def trace(events: list[dict[str, Any]], begin: float = 0, end: float = 150, base_s: float = 0, **more: Any) -> Any:
    """As torch writes it, from `begin` to `end` ms."""
    span = {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "ts": begin * 1e3, "dur": (end - begin) * 1e3}
    noise = [{"ph": "M", "name": "process_name", "ts": 0.0}, {"ph": "s", "cat": "ac2g", "ts": 1.0}]
    return {"baseTimeNanoseconds": base_s * 1e9, "traceEvents": [*noise, *events, span], **more}


def told(*events: dict[str, Any]) -> dict[str, Any]:
    """Of the 100 ms from 50 to 150."""
    return profiled.summarise([profiled.parse(trace(list(events)), "r")])[0]


def test_kernels_that_overlap_count_once_and_pulls_leave_a_device_idle() -> None:
    found = told(
        ran("fused_moe_kernel", 60, 80),
        ran("persistent_kernel", 70, 90, stream=20),
        ran("nvjet_sm90", 85, 95),
        ran("nvjet_sm90", 61, 62, stream=20),
        ran("Memcpy PtoP (Device -> Device)", 50, 100, stream=30, cat="gpu_memcpy"),
        ran("void at::native::" + "x" * 300, 120, 121),
        ran("void at::native::" + "x" * 301, 122, 123),
        ran("Memset (Device)", 110, 111, cat="gpu_memset"),
        ran("cudaLaunchKernel", 50, 150, cat="cuda_runtime"),
        ran("execute_context_0(0)_generation_1(1)", 50, 150, cat="gpu_user_annotation"),
    )
    assert found["device"] and found["span_ms"] == 100
    kinds = {kind: ms for kind, ms in found["kinds"].items() if ms}
    assert kinds == {"experts": 30, "matrix products": 11, "pulls": 50, "copies": 1, "other": 2}
    # Kernels from 60 to 95; the pull from 50 to 100 is beside them.
    assert (found["busy_ms"], found["idle_ms"], found["idle_pulling_ms"]) == (38, 62, 15)
    assert found["longest"]["nvjet_sm90"] == {"ms": 11, "kind": "matrix products"}
    assert found["longest"][("void at::native::" + "x" * 300)[:200]] == {"ms": 2, "kind": "other"}


def test_a_stream_of_copies_alone_pulls() -> None:
    within = "Memcpy DtoD (Device -> Device)"
    found = told(
        ran(within, 60, 70, stream=30, cat="gpu_memcpy"),
        ran("memcpy128", 70, 72, stream=30),
        ran("Memcpy HtoD (Pinned -> Device)", 72, 73, stream=30, cat="gpu_memcpy"),
        ran("fused_moe_kernel", 60, 61),
        ran(within, 61, 65, cat="gpu_memcpy"),
    )
    assert (found["kinds"]["pulls"], found["kinds"]["copies"], found["busy_ms"]) == (12, 5, 6)


def test_only_the_time_that_all_ranks_have_in_common_counts() -> None:
    """Rank 1 begins 100 ms later and goes on, waiting, while rank 0 writes its trace; their clocks have other bases."""
    step = "execute_context_1(8192)_generation_0(0)"
    first = [
        ran("fused_moe_kernel", 1100, 1260),
        *(ran(step, at, at + 5, cat="user_annotation") for at in (1100, 1200)),
    ]
    second = [ran("nccl", 240, 6000), ran("nccl", 100, 160), ran("later", 6000, 6001)]
    ranks = [
        profiled.parse(trace([*first, ran("aten::mm", 1200, 1210, cat="cpu_op")], 1000, 1300), "0"),
        profiled.parse(trace(second, 100, 7000, base_s=1), "1"),
    ]
    found = profiled.summarise(ranks)
    assert [rank["span_ms"] for rank in found] == [150, 150]  # from 1150 to 1300
    assert found[0]["kinds"]["experts"] == 110 and found[0]["steps"] == 1
    assert found[1]["kinds"]["collectives"] == 70 and set(found[1]["longest"]) == {"nccl"}
    with pytest.raises(ValueError, match="2 traces have no time in common but the first 50 ms"):
        profiled.summarise([ranks[0], profiled.parse(trace([], 1260, 2000), "1")])


def test_an_idle_device_is_not_a_cpu() -> None:
    idle = trace([ran("aten::mm", 60, 90, cat="cpu_op")], deviceProperties=[{"id": 0}])
    found = profiled.summarise([profiled.parse(idle, "0")])[0]
    assert found["device"] and found["busy_ms"] == 0 and found["idle_ms"] == 100


def test_operators_of_a_cpu_count_where_no_other_one_called_them() -> None:
    found = told(
        ran("vllm::moe_forward", 60, 80, cat="cpu_op"),
        ran("aten::mm", 60, 70, cat="cpu_op"),
        ran("aten::mm", 80, 90, cat="cpu_op"),
        ran("aten::mm", 65, 75, stream=8, cat="cpu_op"),
    )
    assert not found["device"] and found["kinds"]["experts"] == 20 and found["kinds"]["matrix products"] == 20
    assert found["busy_ms"] == 30


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two traces that torch has written as vLLM lets it, of two products in a step after what is left out."""
    folder = tmp_path_factory.mktemp("traces")
    from torch.profiler import ProfilerActivity, profile, record_function, tensorboard_trace_handler

    handler = tensorboard_trace_handler(str(folder), "load-dwdp-0_dp10_rank0", use_gzip=True)
    weight, until = torch.ones(256, 256), profiled.SETTLE_US / 1e6 + 0.02
    with profile(activities=[ProfilerActivity.CPU], on_trace_ready=handler):
        begun = time.perf_counter()
        while time.perf_counter() < begun + until:
            time.sleep(0.01)
        with record_function("execute_context_1(256)_generation_0(0)"):
            torch.nn.functional.linear(torch.nn.functional.linear(weight, weight), weight)
    (made,) = folder.iterdir()
    other = folder / "load-dwdp-0_dp9_rank0.17.pt.trace.json"
    other.write_bytes(gzip.decompress(made.read_bytes()))
    return [made, other]


def test_a_trace_of_torch_is_read(real: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert {path.suffix for path in real} == {".gz", ".json"}
    monkeypatch.setattr(sys, "argv", ["profiled", "--json", *map(str, real)])
    assert profiled.main() == 0
    ranks = json.loads(capsys.readouterr().out)
    # Ten follows nine.
    assert [rank["rank"] for rank in ranks] == ["load-dwdp-0_dp9_rank0", "load-dwdp-0_dp10_rank0"]
    for rank in ranks:
        assert not rank["device"] and rank["steps"] == 1
        assert rank["longest"]["aten::linear"]["kind"] == "matrix products" and "aten::mm" not in rank["longest"]
        assert 0 < rank["kinds"]["matrix products"] <= rank["busy_ms"] <= rank["span_ms"]
        assert rank["idle_ms"] == pytest.approx(rank["span_ms"] - rank["busy_ms"], abs=0.01)
    monkeypatch.setattr(sys, "argv", ["profiled", str(real[0])])
    assert profiled.main() == 0
    said = capsys.readouterr().out
    assert "no device: operators on CPU" in said and "aten::linear" in said


def test_a_file_that_is_no_trace_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.1.pt.trace.json.gz"
    cut.write_bytes(gzip.compress(json.dumps(trace([])).encode())[:-20])
    (other := tmp_path / "other.1.pt.trace.json").write_text("[1]")
    (endless := tmp_path / "endless.1.pt.trace.json").write_text('{"traceEvents": []}')
    (torn := tmp_path / "torn.1.pt.trace.json").write_text('{"traceEvents": [{"ph": "X", "cat": "Trace", "ts": 0}]}')
    (odd := tmp_path / "odd.1.pt.trace.json").write_text('{"traceEvents": [1]}')
    for path, why in (
        (torn, "torn.1.pt.trace.json: not written by torch's profiler: KeyError 'dur'"),
        (odd, "odd.1.pt.trace.json: not written by torch's profiler: AttributeError"),
        (cut, "cut.1.pt.trace.json.gz: "),
        (other, "no traceEvents"),
        (endless, "when it began and ended"),
    ):
        monkeypatch.setattr(sys, "argv", ["profiled", str(path)])
        assert profiled.main() == 1
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1


def test_what_json_does_not_have_spoils_no_trace(tmp_path: Path) -> None:
    """Numbers as C++ prints them, and letters of names that are not escaped."""
    path = tmp_path / "r.1.pt.trace.json"
    text = json.dumps(trace([ran("fused_moe_kernel@", 60, 80) | {"args": {"blocks": -1, "warps": -1}}]))
    text = text.replace("@", "\t").replace('"blocks": -1', '"blocks": inf').replace('"warps": -1', '"warps":-nan')
    path.write_text(text + "\n")
    assert b"inf, " in path.read_bytes() and [event.end for event in profiled.read(path).events] == [80e3]


def rank(experts: float, steps: int, **longest: float) -> dict[str, Any]:
    kinds = dict.fromkeys(profiled.KINDS, 0.0) | {"experts": experts}
    names = {name: {"ms": ms, "kind": "experts"} for name, ms in longest.items()}
    times = {"busy_ms": experts, "idle_ms": 100 - experts, "idle_pulling_ms": 0.0}
    return {"rank": "", "device": True, "span_ms": 100.0, "steps": steps, "kinds": kinds, "longest": names, **times}


def test_a_table_has_means_of_ranks_side_by_side() -> None:
    ranks = [rank(30, 4, a=30, b=1), rank(50, 6, c=50)]
    text = table({"decode8": {"dpep": ranks, "dwdp": [rank(80, 0, a=80)]}, "none": {}})
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "40.00 ( 40.0%)" in rows["experts"] and "80.00 ( 80.0%)" in rows["experts"] and "attention" not in rows
    assert "60.00 ( 60.0%)" in rows["idle"] and "5.0 of 20.00 ms" in rows["steps"] and rows["steps"].endswith(" -")
    assert "dpep, 2 ranks" in text and "none" not in text
    # Of a kernel that a rank did not run: nothing.
    assert longest(ranks) == [("c", 25.0, "experts"), ("a", 15.0, "experts"), ("b", 0.5, "experts")]
