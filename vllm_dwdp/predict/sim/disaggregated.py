"""Run a scenario with a pool that decodes: each way computes prompts, the same engines decode, KV caches move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_dwdp.predict.sim.decode_pool import DecodeCosts, DecodeLog, run_decode
from vllm_dwdp.predict.sim.engine import Log
from vllm_dwdp.predict.sim.run import Bar, Fleet, percentiles, streams_of
from vllm_dwdp.predict.sim.scenario import Scenario


@dataclass(frozen=True)
class PoolsResult:
    """One way of prefill. Seconds, as 50th, 90th and 99th percentile; tokens/s per accelerator of both pools; shares of the
    time of the accelerators of one.

    requests: all that came. computed: those whose prompt was. ttft: to the first token, which decode computes. transfer:
    from the last of a KV cache sent to the step that takes it. exposed, waiting: of prefill, as in `Result`.
    """

    way: str
    requests: int
    computed: int
    finished: int
    lost: int
    output_per_gpu: float
    ttft: tuple[float, float, float]
    gap: tuple[float, float, float]
    transfer: tuple[float, float, float]
    exposed: float
    waiting: float
    prefill_idle: float
    decode_idle: float


def run_disaggregated(scenario: Scenario, progress: bool = False) -> list[PoolsResult]:
    """All ways of the scenario, which has a pool; `progress` shows a bar on stderr."""
    s, pool = scenario, scenario.pool
    assert pool is not None
    isl = round(s.stream.lengths.mean)
    transfer_s = s.model.kv_bytes(isl, s.options.kv_element) / isl / pool.transfer
    fleet, costs = Fleet(s, transfer_s), DecodeCosts(s)
    groups, engines = s.ranks // s.group_size, pool.ranks // pool.group_size
    bar = Bar((groups + engines) * len(s.ways), progress)
    results = []
    for way in s.ways:
        prefill, decode, handed, came_in = Log(), DecodeLog(), [], 0
        for group in range(groups):
            streams = streams_of(s, group)
            came_in += sum(map(len, streams))
            log = fleet.run(way, group, streams)
            handed.append(np.array(log.handed).reshape(-1, 3))
            del log.handed[:]
            prefill.add(log)
            bar.step()
        requests = np.concatenate(handed)
        # A router that takes engines in turn.
        requests = requests[np.argsort(requests[:, 1], kind="stable")]
        for engine in range(engines):
            came, sent, tokens = requests[engine::engines].T
            decode.add(run_decode(costs, came, sent, tokens, s.stream.osl, transfer_s, s.seconds))
            bar.step()
        results.append(_result(way, came_in, prefill, len(requests), decode, s))
    bar.close()
    return results


def _result(way: str, came_in: int, prefill: Log, computed: int, decode: DecodeLog, s: Scenario) -> PoolsResult:
    assert s.pool is not None
    time = s.ranks * s.seconds
    return PoolsResult(
        way=way,
        requests=came_in,
        computed=computed,
        finished=decode.finished,
        lost=prefill.lost,
        output_per_gpu=decode.tokens / (s.ranks + s.pool.ranks) / s.seconds,
        ttft=percentiles(decode.ttft, None),
        gap=percentiles(*decode.gap_values()),
        transfer=percentiles(decode.waits, None),
        exposed=prefill.exposed / time,
        waiting=max(0.0, prefill.waited / time),
        prefill_idle=max(0.0, 1 - (prefill.busy + prefill.waited) / time),
        decode_idle=max(0.0, 1 - decode.busy / s.pool.ranks / s.seconds),
    )
