"""DwdpConfig: what is accepted, what is refused, and how."""

import ctypes
import json
import os
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dwdp.config import DwdpConfig
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.platform import CPU, CUDA
from vllm_dwdp.transport.base import Copy
from vllm_dwdp.transport.shm_copy import ShmCopyEngine
from vllm_dwdp.transport.vmm_socket import DescriptorServer, fetch


def test_missing_and_empty_give_the_defaults() -> None:
    assert DwdpConfig.parse(None) == DwdpConfig.parse({}) == DwdpConfig()
    assert (DwdpConfig().num_slots, DwdpConfig().direct_tokens) == (2, "auto")
    assert DwdpConfig().resolve_slice_bytes(CPU) == 1 << 20
    assert DwdpConfig().resolve_slice_bytes(CUDA) is None
    assert DwdpConfig(slice_bytes=8192).resolve_slice_bytes(CUDA) == 8192


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "group_size": st.none() | st.integers(2, 72),
            "experts_per_rank": st.none() | st.sampled_from(["auto", "partition"]) | st.integers(1, 512),
            "num_slots": st.integers(2, 8),
            "slice_bytes": st.none() | st.integers(16, 1 << 20).map(lambda n: n * 256),
            "transport": st.sampled_from(["auto", "cupy_ipc", "vmm", "cuda_pinned", "shm"]),
            "weight_view": st.sampled_from(["auto", "split", "contiguous", "inplace"]),
            "launcher": st.sampled_from(["auto", "ray", "mp", "uni"]),
            "ranks_per_device": st.integers(1, 4),
            "timeout_s": st.integers(1, 1000) | st.floats(0.001, 1e6),
            "trace": st.booleans(),
            "require_win": st.booleans(),
            "direct_tokens": st.just("auto") | st.integers(0, 4096),
        },
    )
)
def test_round_trip_through_json(raw: dict[str, Any]) -> None:
    config = DwdpConfig.parse(raw)
    assert DwdpConfig.parse(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(DwdpConfig.parse(raw))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("num_slots=2", ["'num_slots=2'", "mapping"]),
        ({"num_slot": 3}, ["'num_slot'", "3", "did you mean 'num_slots'"]),
        ({"xyz": 3}, ["'xyz'", "known keys", "group_size"]),
        ({3: 3}, ["unknown key 3"]),
        ({"num_slots": 1}, ["num_slots is 1", ">= 2"]),
        ({"num_slots": True}, ["num_slots is True", "bool", "whole number"]),
        ({"num_slots": 2.0}, ["2.0", "float"]),
        ({"num_slots": None}, ["None", "whole number"]),
        ({"group_size": 1}, ["group_size is 1", ">= 2"]),
        ({"group_size": "4"}, ["'4'", "str"]),
        ({"experts_per_rank": 0}, ["experts_per_rank is 0", ">= 1"]),
        (
            {"experts_per_rank": "atuo"},
            ["'atuo'", "'auto', 'partition' or a whole number >= 1", "did you mean 'auto'?"],
        ),
        ({"experts_per_rank": "64"}, ["'64'", "'auto', 'partition' or a whole number >= 1"]),
        ({"experts_per_rank": "Partiton"}, ["'Partiton'", "did you mean 'partition'?"]),
        ({"experts_per_rank": 64.0}, ["64.0", "float", "whole number"]),
        ({"num_slots": "auto"}, ["num_slots is 'auto'", "str", "whole number >= 2"]),
        ({"ranks_per_device": 0}, ["ranks_per_device is 0", ">= 1"]),
        ({"slice_bytes": 2048}, ["slice_bytes is 2048", ">= 4096"]),
        ({"slice_bytes": 5000}, ["slice_bytes is 5000", "multiple of 256", "4864"]),
        ({"in_flight": 4}, ["dwdp.in_flight is 4", "a setting that is gone", "leave it out"]),
        ({"in_flight": 1}, ["dwdp.in_flight is 1", "a setting that is gone", "leave it out"]),
        ({"transport": "nvlink"}, ["'nvlink'", "auto, cupy_ipc, vmm, cuda_pinned, shm"]),
        ({"transport": ["shm"]}, ["['shm']", "one of"]),
        ({"weight_view": "continuous"}, ["did you mean 'contiguous'"]),
        ({"launcher": 3}, ["launcher is 3", "auto, ray, mp, uni"]),
        ({"timeout_s": 0}, ["timeout_s is 0", "above 0"]),
        ({"timeout_s": float("inf")}, ["inf", "finite"]),
        ({"timeout_s": float("nan")}, ["nan", "finite"]),
        ({"timeout_s": 1e12}, ["timeout_s is 1000000000000.0", "at most 1e+09"]),
        ({"timeout_s": True}, ["True", "seconds"]),
        ({"timeout_s": "5"}, ["'5'", "seconds"]),
        ({"trace": 1}, ["trace is 1", "true or false"]),
        ({"direct_tokens": "0"}, ["direct_tokens is '0'", "'auto' or a whole number >= 0"]),
        ({"direct_tokens": "atuo"}, ["direct_tokens is 'atuo'", "did you mean 'auto'?"]),
        ({"direct_tokens": -1}, ["direct_tokens is -1", ">= 0"]),
        ({"direct_tokens": True}, ["direct_tokens is True", "bool", "whole number >= 0"]),
        ({"direct_tokens": 1.5}, ["direct_tokens is 1.5", "float", "whole number >= 0"]),
        ({"direct_tokens": None}, ["direct_tokens is None", "whole number >= 0"]),
        ({"rendezvous": "host:1/g"}, ["dwdp.rendezvous is 'host:1/g'", "a setting that is gone", "leave it out"]),
        ({"rendezvous": None}, ["dwdp.rendezvous is None", "a setting that is gone", "leave it out"]),
    ],
)
def test_refusals_are_one_line_with_value_range_and_remedy(raw: object, words: list[str]) -> None:
    with pytest.raises(DwdpError) as caught:
        DwdpConfig.parse(raw)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_waits_take_the_longest_limit() -> None:
    """Beyond it Python's locks and sockets raise OverflowError: in a forward, at its first wait for a copy."""
    limit = DwdpConfig.parse({"timeout_s": 10**9}).timeout_s
    target, source = ctypes.create_string_buffer(8), ctypes.create_string_buffer(b"7654321")
    engine = ShmCopyEngine(before_copy=lambda copy: time.sleep(0.01))
    program = engine.bind([Copy(ctypes.addressof(target), ctypes.addressof(source), 8)])
    engine.finish(engine.submit(program), limit)
    engine.close(limit)
    assert target.raw == source.raw
    server = DescriptorServer()
    with open(os.devnull) as given:
        token = server.offer([os.dup(given.fileno())])
    assert len(list(fetch(server.name, token, 1, limit))) == 1
    server.close()


def test_construction_checks_as_well() -> None:
    with pytest.raises(DwdpError, match="num_slots is 1"):
        DwdpConfig(num_slots=1)


@pytest.mark.parametrize(
    ("config", "num_ranks", "num_experts", "words"),
    [
        (DwdpConfig(), 1, None, ["at least 2 ranks", "is 1"]),
        (DwdpConfig(group_size=4), 6, None, ["group_size is 4", "is 6", "2, 3, 6"]),
        (DwdpConfig(group_size=8), 4, 64, ["group_size is 8", "is 4", "2, 4"]),
        (DwdpConfig(), 16, 8, ["16 ranks", "8 experts", "group_size to 8"]),
        (DwdpConfig(experts_per_rank=3), 2, 8, ["experts_per_rank is 3", "at least 4", "4..7"]),
        (DwdpConfig(experts_per_rank=8), 2, 8, ["experts_per_rank is 8", "nothing is left to fetch", "4..7"]),
        (DwdpConfig(experts_per_rank=9), 2, 8, ["experts_per_rank is 9", "4..7"]),
        (DwdpConfig(experts_per_rank=31, group_size=2), 4, 63, ["at least 32"]),
    ],
)
def test_check_refuses(config: DwdpConfig, num_ranks: int, num_experts: int | None, words: list[str]) -> None:
    with pytest.raises(DwdpError) as caught:
        config.check(num_ranks, num_experts)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_check_accepts_and_resolves_the_group() -> None:
    DwdpConfig(group_size=2, experts_per_rank=5).check(6, 8)
    DwdpConfig(group_size=2, experts_per_rank=5).check(6, None)
    # What "auto" will be is not known yet.
    DwdpConfig(group_size=2, experts_per_rank="auto").check(6, 8)
    assert (DwdpConfig(experts_per_rank="auto").held, DwdpConfig(experts_per_rank=5).held) == (None, 5)
    assert DwdpConfig(experts_per_rank="partition").held is None


@pytest.mark.parametrize(
    ("settings", "on_cpu", "on_gpus"),
    [
        ({}, False, True),
        ({"ranks_per_device": 2}, False, False),
        ({"experts_per_rank": "auto"}, True, True),
        ({"experts_per_rank": "auto", "ranks_per_device": 2}, True, True),
        ({"experts_per_rank": "partition"}, False, False),
        ({"experts_per_rank": 5}, False, False),
    ],
)
def test_memory_decides_where_asked_and_on_gpus_of_ones_own(
    settings: dict[str, Any], on_cpu: bool, on_gpus: bool
) -> None:
    config = DwdpConfig.parse(settings)
    assert (config.goes_by_memory(CPU), config.goes_by_memory(CUDA)) == (on_cpu, on_gpus)
    assert DwdpConfig().resolve_group_size(6) == 6
    assert DwdpConfig(group_size=3).resolve_group_size(6) == 3
