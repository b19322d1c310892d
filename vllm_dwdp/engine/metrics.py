"""`dwdp:` series on vLLM's own /metrics, from the ranks' counter pages (rank_pages.py).

One process of a launch publishes, however many API servers there are: the only one, or the first. It adds the growth of
each counter, so that the figures are neither multiplied nor dependent on which server has traffic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_dwdp.prefetch.counters import Counters


class Series(NamedTuple):
    """One series: its name without `_total`, the counter's field, and what one unit of the field is in the series."""

    name: str
    field: str
    unit: float
    help: str


COUNTERS = (
    Series("dwdp:forwards", "forwards", 1, "Forwards of the model."),
    Series("dwdp:direct_forwards", "direct_forwards", 1, "Forwards that read missing experts where they are."),
    Series("dwdp:direct_bytes", "direct_bytes", 1, "Bytes that those read from peers, as expected of an even router."),
    Series("dwdp:travel_forwards", "travel_forwards", 1, "Forwards whose tokens travel to owners of missing experts."),
    Series("dwdp:travel_requests", "travel_requests", 1, "Requests to owners, one for each layer."),
    Series("dwdp:travel_late", "travel_late", 1, "Requests without an answer in time; experts were read directly."),
    Series("dwdp:travel_served", "travel_served", 1, "Requests of other ranks that were answered."),
    Series("dwdp:layers", "layers", 1, "MoE layers that were waited for, or read in place on CPU."),
    Series("dwdp:pulled_bytes", "pulled_bytes", 1, "Bytes of experts copied from peers."),
    Series("dwdp:merged_bytes", "merged_bytes", 1, "Bytes of own experts copied into slots (contiguous view)."),
    Series(
        "dwdp:exposed_wait_seconds",
        "exposed_wait_ns",
        1e-9,
        "Time compute stood still for a pull, where it can be told.",
    ),
    Series("dwdp:slot_waits", "slot_waits", 1, "MoE layers that had to wait for a pull."),
    Series(
        "dwdp:on_demand_fetches", "on_demand_fetches", 1, "MoE layers that were not on their way when they were needed."
    ),
    Series(
        "dwdp:kernels_compiled_after_start",
        "kernels_compiled_after_start",
        1,
        "Kernels of the split view that a request waited for the compiler for; 0 is right.",
    ),
)
GAUGES = (
    Series("dwdp:experts_held", "experts_held", 1, "Experts of a layer resident on the rank."),
    Series("dwdp:slab_bytes", "slab_bytes", 1, "Bytes of the rank's share of all layers."),
    Series("dwdp:slot_bytes", "slot_bytes", 1, "Bytes of the rank's prefetch buffers."),
    Series("dwdp:peers_alive", "peers_alive", 1, "Other ranks of the group that are there."),
)

_metrics: dict[str, Any] = {}


def _metric(kind: str, series: Series) -> Any:
    # Prometheus refuses a second registration; one process may build several engines.
    if series.name not in _metrics:
        import prometheus_client

        if kind == "counter":
            _metrics[series.name] = prometheus_client.Counter(series.name, series.help, ["engine"])
        else:
            # The publishing process alone sets it: of several processes' values the greatest is right.
            _metrics[series.name] = prometheus_client.Gauge(
                series.name, series.help, ["engine"], multiprocess_mode="max"
            )
    return _metrics[series.name]


def publish(rank: int, now: Counters, before: Counters | None) -> None:
    """Add what the counters of `rank` have grown by since `before` to Prometheus."""
    for series in COUNTERS:
        grown = getattr(now, series.field) - (getattr(before, series.field) if before else 0)
        _metric("counter", series).labels(str(rank)).inc(max(grown, 0) * series.unit)
    for series in GAUGES:
        if before is None or getattr(now, series.field) != getattr(before, series.field):
            _metric("gauge", series).labels(str(rank)).set(getattr(now, series.field) * series.unit)
