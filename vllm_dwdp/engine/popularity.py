"""The settings `hits` and `popularity` in the front end: refused with one line before anything starts, or read once."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.hits_file import Hits, read_hits

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_dwdp.config import DwdpConfig
    from vllm_dwdp.platform import Platform

logger = init_logger("vllm.dwdp")


def with_hits_file(config: DwdpConfig) -> DwdpConfig:
    """`config` with the path of `hits` from the root on, for ranks that run elsewhere; raises DwdpError where no file can
    be written there."""
    if config.hits is None:
        return config
    # The file is renamed into place: a link would be replaced, and so would a device.
    path = os.path.realpath(config.hits)
    folder = os.path.dirname(path)
    other = os.path.exists(path) and not os.path.isfile(path)
    if other or not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise DwdpError(f"dwdp.hits is {config.hits}, where no file can be written: name a file in a folder of yours")
    return replace(config, hits=path)


def popularity_of(config: DwdpConfig, platform: Platform) -> Hits | None:
    """What the file `popularity` says; raises DwdpError where it says nothing, or experts cannot be placed by it."""
    if config.popularity is None:
        return None
    if config.weight_view in ("inplace", "composite"):
        raise DwdpError(
            f'dwdp.popularity scatters experts, which weight_view "{config.weight_view}" cannot map by pages: use '
            "weight_view auto or contiguous"
        )
    if config.held is None and not config.goes_by_memory(platform):
        raise DwdpError(
            "dwdp.popularity chooses the experts that a rank holds beyond E/N, and there are none: raise "
            "dwdp.experts_per_rank, or leave popularity out"
        )
    hits = read_hits(config.popularity)
    if "inplace" in platform.views and config.weight_view == "auto":
        logger.info("dwdp: popularity scatters experts over pages: weight_view auto is contiguous")
    return hits


def check_popularity(hits: Hits, config: DwdpConfig, num_ranks: int, experts: int, model_config: ModelConfig) -> None:
    """Check against the number of ranks and the model, as far as its config tells; raises DwdpError."""
    size, held = config.resolve_group_size(num_ranks), config.experts_per_rank
    if isinstance(held, int) and held * size <= experts:
        raise DwdpError(
            f"dwdp.popularity chooses the experts that a rank holds beyond E/N, but dwdp.experts_per_rank is {held} of "
            f"{experts} on {size} ranks: raise it, or leave popularity out"
        )
    layers = int(getattr(model_config.hf_text_config, "num_hidden_layers", len(hits.layers)))
    if len(hits.layers) > layers:
        raise DwdpError(
            f"dwdp.popularity has {len(hits.layers)} MoE layers, but {model_config.model} has {layers} layers: "
            "count hits with this model"
        )
    for name, counts in hits.layers.items():
        if len(counts) != experts:
            raise DwdpError(
                f"dwdp.popularity has {len(counts)} experts for {name}, but {model_config.model} has {experts}: "
                "count hits with this model"
            )
