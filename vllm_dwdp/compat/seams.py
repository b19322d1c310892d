"""Every symbol of vLLM that is wrapped, replaced, overridden or private, and what is relied on: checked by its source.

Checked before a launch (engine/select.py) and against a wheel (ci/checks/check_seams.py).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from vllm_dwdp.compat.sources import Found, Sources, annotation_of, parameters_of

Kind = Literal["function", "method", "class", "attribute"]


@dataclass(frozen=True)
class Seam:
    """One name of vLLM.

    Attributes:
        name: dotted; a member of a class may come from a base of it.
        used_by: our file, below the repository's root.
        parameters: those that we pass or take, in vLLM's order.
        attributes: of a class, what it has to have: members of its body or set on `self`.
        returns: vLLM's annotation of what a function returns, or of an attribute, where we use or give it.
        optional: used where a release of vLLM has it, and not missed where it does not.
    """

    name: str
    kind: Kind
    used_by: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    returns: str = ""
    optional: bool = False


_P = "vllm_dwdp/patches/"
_E = "vllm_dwdp/engine/"
_L = "vllm_dwdp/layers/"
_MOE = "vllm.model_executor.layers.fused_moe."
_QUANT = "vllm.model_executor.layers.quantization."
_CT = _QUANT + "compressed_tensors.compressed_tensors_moe."
_LOADER = "vllm.model_executor.model_loader."
_RAY = "vllm.v1.executor.ray_executor_v2."

SEAMS: Final = (
    # Wrapped or replaced: patches/README.md.
    Seam("vllm.engine.arg_utils.EngineArgs.create_engine_config", "method", _P + "engine_args.py",
         ("self", "usage_context", "headless"), returns="VllmConfig"),
    Seam("vllm.engine.arg_utils.EngineArgs.create_model_config", "method", _E + "configure.py", ("self",),
         returns="ModelConfig"),
    Seam("vllm.engine.arg_utils.EngineArgs", "class", _E + "configure.py",
         attributes=("_api_process_count", "_api_process_rank", "distributed_executor_backend", "additional_config",
                     "moe_backend", "disable_log_stats", "data_parallel_size")),
    Seam("vllm.entrypoints.llm.LLM.__init__", "method", _P + "llm_init.py", ("self", "model", "kwargs")),
    Seam("vllm.platforms.interface.Platform.is_tpu", "method", _P + "llm_init.py", ("self",), returns="bool"),
    Seam("vllm.platforms.interface.Platform.ray_device_key", "attribute", _P + "ray_worker.py", returns="str"),
    Seam("vllm.v1.engine.core_client.EngineCoreClient.make_client", "method", _P + "sync_client.py",
         ("multiprocess_mode", "asyncio_mode", "vllm_config", "executor_class", "log_stats", "renderer"),
         returns="'EngineCoreClient'"),
    Seam("vllm.v1.engine.utils.CoreEngineProcManager.__init__", "method", _P + "engine_start.py",
         ("self", "vllm_config", "executor_class")),
    Seam("vllm.v1.engine.utils.CoreEngineProcManager.monitor_engine_liveness", "method", _P + "engine_liveness.py",
         ("self",)),
    Seam("vllm.v1.engine.utils.CoreEngineProcManager", "class", _P + "engine_liveness.py",
         attributes=("failed_proc_name", "processes")),
    Seam(_RAY + "RayWorkerProc", "class", _P + "ray_worker.py", attributes=("_parallel_config", "worker_response_mq")),
    Seam("vllm.config.ModelConfig.is_moe", "method", _E + "model_config.py", ("self",), returns="bool"),
    # Overridden in executors.
    Seam("vllm.v1.executor.abstract.Executor.get_kv_connector_handshake_metadata", "method", _E + "executor.py", ("self",),
         returns="list[dict[tuple[int, int], KVConnectorHandshakeMetadata]]"),
    Seam("vllm.v1.executor.uniproc_executor.UniProcExecutor._init_executor", "method", _E + "executor.py", ("self",)),
    Seam("vllm.v1.executor.uniproc_executor.UniProcExecutor._distributed_args", "method", _E + "executor.py", ("self",),
         returns="tuple[str, int, int]"),
    Seam("vllm.v1.executor.multiproc_executor.MultiprocExecutor._init_executor", "method", _E + "executor.py", ("self",)),
    Seam("vllm.v1.executor.multiproc_executor.MultiprocExecutor._post_init_executor", "method", _E + "executor.py",
         ("self",)),
    Seam("vllm.v1.executor.multiproc_executor.MultiprocExecutor", "class", _E + "executor.py",
         attributes=("workers", "supports_pp")),
    Seam(_RAY + "RayExecutorV2._init_executor", "method", _E + "ray_executor.py", ("self",)),
    Seam(_RAY + "RayExecutorV2._post_init_executor", "method", _E + "ray_executor.py", ("self",)),
    Seam(_RAY + "RayExecutorV2._get_actor_resource_kwargs", "method", _E + "ray_executor.py", returns="dict[str, Any]"),
    Seam(_RAY + "RayExecutorV2.shutdown", "method", _E + "ray_executor.py", ("self",)),
    Seam(_RAY + "RayExecutorV2", "class", _E + "ray_executor.py",
         attributes=("ray_worker_handles", "rpc_broadcast_mq", "is_failed", "shutting_down", "supports_pp")),
    Seam(_RAY + "RayWorkerProc.initialize_worker", "method", _E + "ray_cpu_worker.py",
         ("self", "local_rank", "env_vars", "distributed_init_method", "driver_env_vars", "assigned_physical_gpu_ids")),
    Seam(_RAY + "RayWorkerProc.get_node_and_physical_gpu_ids", "method", _E + "ray_cpu_worker.py", ("self",),
         returns="tuple[str, list[int]]"),
    Seam(_RAY + "RayWorkerProc.worker_busy_loop", "method", _E + "ray_cpu_worker.py", ("self",)),
    # The offline client.
    Seam("vllm.v1.engine.core_client.SyncMPClient", "class", _E + "offline_client.py",
         attributes=("_finalizer", "ensure_alive", "input_socket", "encoder", "core_engines", "outputs_queue", "resources",
                     "utility_results", "is_dp")),
    Seam("vllm.v1.engine.core_client.SyncMPClient.__init__", "method", _E + "offline_client.py", ("self", "vllm_config")),
    Seam("vllm.v1.engine.core_client.SyncMPClient.add_request", "method", _E + "offline_client.py", ("self", "request")),
    Seam("vllm.v1.engine.core_client.SyncMPClient.get_output", "method", _E + "offline_client.py", ("self",),
         returns="EngineCoreOutputs"),
    Seam("vllm.v1.engine.core_client.SyncMPClient.abort_requests", "method", _E + "offline_client.py",
         ("self", "request_ids")),
    Seam("vllm.v1.engine.core_client.SyncMPClient.call_utility", "method", _E + "offline_client.py", ("self", "method")),
    # Workers and the model runner.
    Seam("vllm.v1.worker.cpu_worker.CPUWorker", "class", _E + "cpu_worker.py", attributes=("requested_cpu_memory",)),
    Seam("vllm.utils.cpu_resource_utils.get_cgroup_memory_limit", "function", _E + "kv_caches.py", returns="int | None"),
    Seam("vllm.utils.cpu_resource_utils.get_memory_node_info", "function", _E + "kv_caches.py", ("node_id",),
         returns="MemoryNodeInfo"),
    Seam("vllm.utils.cpu_resource_utils.get_visible_memory_node", "function", _E + "kv_caches.py", returns="list[int]"),
    Seam("vllm.v1.worker.gpu_worker.Worker", "class", _E + "frozen.py",
         attributes=("reload_weights", "init_weight_transfer_engine", "start_weight_update",
                     "start_draft_weight_update", "update_weights", "finish_weight_update", "elastic_ep_execute",
                     "save_sharded_state", "save_tensorized_model", "sleep", "discard", "requested_memory")),
    Seam("vllm.v1.worker.gpu_worker.Worker.reset_weights", "method", _E + "frozen.py", optional=True),
    Seam("vllm.v1.worker.gpu_worker.Worker.compute_weight_checksums", "method", _E + "frozen.py", optional=True),
    Seam("vllm.v1.worker.gpu_worker.Worker.__init__", "method", _E + "worker.py", ("self", "vllm_config")),
    Seam("vllm.v1.worker.gpu_worker.Worker.load_model", "method", _E + "worker.py", ("self",)),
    Seam("vllm.v1.worker.gpu_worker.Worker.determine_available_memory", "method", _E + "worker.py", ("self",),
         returns="int"),
    Seam("vllm.v1.worker.gpu_worker.Worker.profile", "method", _E + "worker.py", ("self", "is_start", "profile_prefix")),
    Seam("vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model", "method", _E + "worker.py", ("self",),
         returns="CompilationTimes"),
    Seam("vllm.v1.worker.gpu_worker.Worker.execute_model", "method", _E + "worker.py", ("self", "scheduler_output"),
         returns="ModelRunnerOutput | AsyncModelRunnerOutput | None"),
    Seam("vllm.v1.worker.gpu_worker.Worker.shutdown", "method", _E + "worker.py", ("self",)),
    Seam("vllm.v1.worker.gpu_model_runner.GPUModelRunner._dummy_run", "method", _E + "gpu_worker.py",
         ("self", "num_tokens", "skip_eplb", "remove_lora")),
    Seam("vllm.v1.worker.gpu_model_runner.GPUModelRunner", "class", _E + "frozen.py",
         attributes=("load_model", "reload_weights", "get_model")),
    # Loading.
    Seam(_LOADER + "default_loader.DefaultModelLoader._init_ep_weight_filter", "method", _E + "loader.py",
         ("self", "model_config")),
    Seam(_LOADER + "default_loader.DefaultModelLoader._get_weights_iterator", "method", _E + "loader.py",
         ("self", "source"), returns="Generator[tuple[str, torch.Tensor], None, None]"),
    Seam(_LOADER + "default_loader.DefaultModelLoader._prepare_weights", "method", _E + "loader.py",
         ("self", "model_name_or_path", "subfolder", "revision", "fall_back_to_pt", "allow_patterns_overrides"),
         returns="tuple[str, list[str], bool, str]"),
    Seam(_LOADER + "default_loader.DefaultModelLoader.load_weights", "method", _E + "loader.py",
         ("self", "model", "model_config")),
    Seam(_LOADER + "base_loader.BaseModelLoader.create_model", "method", _E + "loader.py",
         ("self", "vllm_config", "model_config", "prefix"), returns="nn.Module"),
    Seam(_LOADER + "base_loader.BaseModelLoader.get_external_weight_memory", "method", _E + "loader.py",
         ("self", "vllm_config"), returns="int", optional=True),
    Seam(_LOADER + "default_loader.DefaultModelLoader", "class", _E + "loader.py",
         attributes=("local_expert_ids", "counter_before_loading_weights", "Source")),
    Seam(_LOADER + "default_loader.DefaultModelLoader.Source.is_unused_weight", "attribute", "vllm_dwdp/compat/versions.py",
         returns="Callable[[str], bool] | None", optional=True),
    Seam(_LOADER + "weight_utils.filter_safetensors_files_by_weight_name", "function", "vllm_dwdp/compat/versions.py",
         ("hf_weights_files", "is_unused_weight"), returns="list[str]", optional=True),
    Seam(_LOADER + "dummy_loader.DummyModelLoader.load_weights", "method", _E + "loader.py",
         ("self", "model", "model_config")),
    Seam(_LOADER + "ep_weight_filter.should_skip_weight", "function", _E + "loader.py",
         ("weight_name", "local_expert_ids"), returns="bool"),
    Seam(_LOADER + "weight_utils.initialize_single_dummy_weight", "function", _E + "dummy.py", ("param",)),
    Seam(_LOADER + "weight_utils.enable_tqdm", "function", _E + "loader.py", ("use_tqdm_on_load",)),
    Seam(_LOADER + "reload.layerwise.LAYERWISE_INFO", "attribute", _E + "frozen.py",
         returns="WeakKeyDictionary[torch.nn.Module, LayerReloadingInfo]"),
    Seam(_LOADER + "reload.types.LayerReloadingInfo", "class", _E + "frozen.py", attributes=("can_load",)),
    # Layers.
    Seam("vllm.model_executor.custom_op.op_registry_oot", "attribute", _L + "routed_experts.py",
         returns="dict[str, type['CustomOp'] | type['PluggableLayer']]"),
    Seam(_MOE + "routed_experts.RoutedExperts.__init__", "method", _L + "routed_experts.py",
         ("self", "layer_name", "params_dtype", "moe_config", "quant_config", "expert_map_manager")),
    Seam(_MOE + "routed_experts.RoutedExperts.forward_modular", "method", _L + "routed_experts.py", ("self", "x"),
         returns="torch.Tensor | UnfinalizedMoEOutput"),
    Seam(_MOE + "routed_experts.RoutedExperts.forward_monolithic", "method", _L + "routed_experts.py", ("self", "x"),
         returns="torch.Tensor | UnfinalizedMoEOutput"),
    Seam(_MOE + "routed_experts.RoutedExperts.update_expert_map_info", "method", _L + "routed_experts.py", ("self",)),
    Seam(_MOE + "routed_experts.RoutedExperts", "class", _L + "routed_experts.py",
         attributes=("quant_method", "moe_config", "expert_map_manager", "top_k")),
    Seam(_MOE + "expert_map_manager.ExpertMapManager", "class", _L + "routed_experts.py",
         attributes=("_local_num_experts", "_expert_map", "_expert_mask", "_routing_tables", "global_num_experts",
                     "num_fused_shared_experts")),
    Seam(_MOE + "routed_experts.RoutedExperts._expert_routing_tables", "method", _L + "methods.py", ("self",)),
    Seam(_MOE + "unquantized_fused_moe_method.UnquantizedFusedMoEMethod._init_moe_kernel", "method",
         _L + "methods.py", ("self", "layer")),
    Seam(_MOE + "unquantized_fused_moe_method.UnquantizedFusedMoEMethod", "class", _L + "views/split.py",
         attributes=("experts_cls", "moe_kernel", "unquantized_backend", "process_weights_after_loading")),
    Seam(_QUANT + "fp8.Fp8MoEMethod._init_moe_kernel", "method", _L + "methods.py", ("self", "layer")),
    # On GPUs only, where vLLM is the version that they are read in.
    Seam(_MOE + "oracle.fp8.make_fp8_moe_kernel", "function", _L + "methods.py",
         ("moe_quant_config", "moe_config", "experts_cls", "fp8_backend", "routing_tables"), optional=True),
    Seam(_MOE + "oracle.int8.make_int8_moe_kernel", "function", _L + "methods.py",
         ("int8_backend", "moe_quant_config", "moe_config", "experts_cls", "routing_tables"), optional=True),
    Seam(_MOE + "oracle.mxfp4.make_mxfp4_moe_kernel", "function", _L + "methods.py",
         ("moe_quant_config", "moe_config", "experts_cls", "mxfp4_backend", "routing_tables"), optional=True),
    Seam(_MOE + "oracle.nvfp4.make_nvfp4_moe_kernel", "function", _L + "methods.py",
         ("moe_quant_config", "moe_config", "experts_cls", "backend", "routing_tables"), optional=True),
    Seam(_QUANT + "modelopt.ModelOptNvFp4FusedMoE._build_moe_kernel", "method", _L + "methods.py", ("self", "layer"),
         optional=True),
    Seam(_QUANT + "utils.marlin_utils_fp4._nvfp4_compute_scale_factor", "function", _P + "block_scales.py",
         ("marlin_scales", "a_dtype"), returns="float", optional=True),
    Seam(_MOE + "routed_experts.RoutedExperts.weight_loader", "method", _L + "routed_experts.py",
         ("self", "param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success")),
    Seam(_QUANT + "auto_gptq.AutoGPTQMoEMethod._setup_kernel", "method", _L + "methods.py", ("self", "layer"),
         optional=True),
    Seam(_QUANT + "auto_awq.AutoAWQMoEMethod._setup_kernel", "method", _L + "methods.py", ("self", "layer"), optional=True),
    Seam(_CT + "compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod._setup_kernel", "method", _L + "methods.py",
         ("self", "layer"), optional=True),
    Seam(_QUANT + "fp8.Fp8MoEMethod", "class", _L + "views/split.py",
         attributes=("experts_cls", "moe_kernel", "fp8_backend", "process_weights_after_loading")),
    # Kernels.
    Seam(_MOE + "experts.triton_moe.TritonExperts", "class", "kernels/experts.py",
         attributes=("_lora_context", "activation_config", "block_shape", "adjust_N_for_activation", "activation",
                     "moe_sum", "moe_problem_size", "workspace_shapes")),
    Seam(_MOE + "experts.triton_moe.TritonExperts.__init__", "method", "kernels/experts.py",
         ("self", "moe_config", "quant_config")),
    Seam(_MOE + "experts.triton_moe.TritonExperts.supports_lora", "method", "kernels/experts.py", returns="bool"),
    Seam(_MOE + "experts.triton_moe.TritonExperts.apply", "method", "kernels/experts.py",
         ("self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
          "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2")),
    Seam(_MOE + "fused_moe._prepare_expert_assignment", "function", "kernels/vllm_ops.py",
         ("topk_ids", "config", "num_tokens", "top_k_num", "global_num_experts", "expert_map"),
         returns="tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]"),
    Seam(_MOE + "fused_moe.try_get_optimal_moe_config", "function", "kernels/vllm_ops.py",
         ("w1_shape", "w2_shape", "top_k", "dtype", "M", "block_shape"), returns="dict[str, int]"),
    Seam(_MOE + "utils.moe_kernel_quantize_input", "function", "kernels/vllm_ops.py",
         ("A", "A_scale", "quant_dtype", "per_act_token_quant", "block_shape"),
         returns="tuple[torch.Tensor, torch.Tensor | None]"),
)  # fmt: skip


def check(seam: Seam, sources: Sources) -> str | None:
    """What of `seam` is otherwise than expected, in one line; None where nothing is."""
    found = sources.find(seam.name)
    if found is None:
        return None if seam.optional else f"{seam.name}: expected a {seam.kind}, found nothing"
    kind = _kind(found)
    wanted = {"method": "function"}.get(seam.kind, seam.kind)
    if wanted not in ("attribute", kind):
        return f"{seam.name}: expected a {seam.kind}, found a {kind}"
    known = parameters_of(found.node)
    if (have := [name for name in known if name in seam.parameters]) != list(seam.parameters):
        return f"{seam.name}: expected the parameters {list(seam.parameters)}, found {have} of {known}"
    if missing := [name for name in seam.attributes if not sources.has_member(found, name)]:
        return f"{seam.name}: expected the members {list(seam.attributes)}, found all but {missing}"
    if seam.returns not in ("", annotation := annotation_of(found.node)):
        return f"{seam.name}: expected {seam.returns}, found {annotation or 'no annotation'}"
    return None


def misfits(root: Path) -> Iterator[str]:
    """What of the table does not hold for the vLLM below `root`, the folder that holds `vllm/`; a line for each."""
    sources = Sources(root)
    return (line for seam in SEAMS if (line := check(seam, sources)) is not None)


def _kind(found: Found) -> str:
    if isinstance(found.node, ast.ClassDef):
        return "class"
    return "function" if isinstance(found.node, (ast.FunctionDef, ast.AsyncFunctionDef)) else "attribute"
