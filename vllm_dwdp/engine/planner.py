"""What the planner is told of a launch; in the front end: what it says of it, before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_dwdp.engine.stored import stored_config
from vllm_dwdp.predict.startup import CPU_DEVICE, PlannedLaunch, predicted_loss

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_dwdp.config import DwdpConfig
    from vllm_dwdp.platform import Platform

logger = init_logger("vllm.dwdp")


def planned(vllm_config: VllmConfig, config: DwdpConfig, group_size: int, platform: Platform) -> PlannedLaunch:
    """The launch as the planner sees it."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return PlannedLaunch(
        config=stored_config(model),
        name=model.model,
        device=CPU_DEVICE if platform.on_cpu else _device(),
        ranks=group_size,
        tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        max_model_len=model.max_model_len,
        share=config.held,
        by_memory=config.goes_by_memory(platform),
        view=config.weight_view,
        num_slots=config.num_slots,
        utilisation=cache.gpu_memory_utilization,
        kv_element=1.0 if str(cache.cache_dtype).startswith("fp8") else 2.0,
        require_win=config.require_win,
    )


def ask_planner(vllm_config: VllmConfig, config: DwdpConfig, group_size: int, platform: Platform) -> None:
    """Log one WARNING where DWDP is predicted to lose; on CPU and with GPUs that ranks share only `require_win` asks.

    Raises DwdpError where `require_win` is set and DWDP is not predicted to win.
    """
    if (platform.on_cpu or config.ranks_per_device > 1) and not config.require_win:
        return
    if loss := predicted_loss(planned(vllm_config, config, group_size, platform)):
        logger.warning("dwdp: %s", loss)


def _device() -> str:
    """The name of the first GPU; a driver that does not tell is no reason not to start."""
    try:
        return str(current_platform.get_device_name())
    except Exception as error:
        return f"a GPU without a name ({error})"
