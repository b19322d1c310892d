"""A model config that lets vLLM run the ranks of a MoE model as it runs those of a dense one: independently."""

from __future__ import annotations

from vllm.config import ModelConfig, VllmConfig


class IndependentRanksModelConfig(ModelConfig):
    """`ModelConfig` whose `is_moe` is False, so that no wave, dummy batch, `DPMetadata` or token-count all-reduce is
    set up (vllm/v1/engine/core.py `run_engine_core`, vllm/config/vllm.py `needs_dp_coordinator`, forward_context.py).

    Pickled by reference: unpickling it imports the plugin before an engine process branches on `is_moe`. Workers take
    it off again (`restore_moe`), or vLLM sets up no expert-parallel group and MoE layers fail.
    """

    @property
    def is_moe(self) -> bool:
        return False


def hide_moe(model_config: ModelConfig) -> None:
    """Make `model_config` answer `is_moe` with False, in place."""
    model_config.__class__ = IndependentRanksModelConfig


def restore_moe(vllm_config: VllmConfig) -> None:
    """Undo `hide_moe` for a worker, before its device and model are set up.

    A worker in its engine's process shares the engine's config. vLLM branches on it before; later it only checks the config
    once more (`EngineCore.__init__`), which then is that of a MoE model on one rank.
    """
    vllm_config.model_config.__class__ = ModelConfig
    vllm_config.parallel_config.is_moe_model = True
