"""Executors of one rank that need no cluster: its worker in the engine's own process, or in one beside it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.config import VllmConfig
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_dwdp.engine.orphans import end_with_parent
from vllm_dwdp.engine.side_channel import check_ports
from vllm_dwdp.group.environment import temporary_files_in
from vllm_dwdp.group.launch import RENDEZVOUS_ENV, DwdpLaunch, launch_of

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata


def enter_engine(vllm_config: VllmConfig) -> DwdpLaunch:
    """In an engine's process, before its worker: end with the front end, and set what the worker reads or inherits."""
    end_with_parent()
    launch = launch_of(vllm_config)
    assert launch is not None
    # This process's worker ends with it from its first imports on.
    os.environ[RENDEZVOUS_ENV] = f"{os.getpid()}:{launch.folder}"
    os.environ.update(launch.environment)
    return launch


class TriesPort(Executor):
    """What all executors of ours do last, before vLLM's scheduler listens: another launch may have taken the port since."""

    def get_kv_connector_handshake_metadata(self) -> list[dict[tuple[int, int], KVConnectorHandshakeMetadata]]:
        metadata = super().get_kv_connector_handshake_metadata()
        check_ports(self.vllm_config, [self.parallel_config.data_parallel_index])
        return metadata


class DwdpUniExecutor(TriesPort, UniProcExecutor):
    """The worker in the engine's process, where plain vLLM has it for one GPU: a step passes no other process."""

    def _init_executor(self) -> None:
        enter_engine(self.vllm_config)
        super()._init_executor()

    def _distributed_args(self) -> tuple[str, int, int]:
        launch = launch_of(self.vllm_config)
        assert launch is not None
        # Here only: what caches compiled code beside it is to be found by the next launch.
        with temporary_files_in(launch.folder):
            return super()._distributed_args()


class DwdpExecutor(TriesPort, MultiprocExecutor):
    """One worker process per rank. The worker meets its peers while it loads; nothing here waits for other ranks."""

    supports_pp: bool = False

    def _init_executor(self) -> None:
        launch = enter_engine(self.vllm_config)
        with temporary_files_in(launch.folder):
            super()._init_executor()

    def _post_init_executor(self) -> None:
        super()._post_init_executor()
        # vLLM's error about a dead worker prints this name: let it say which rank of the launch died.
        launch = launch_of(self.vllm_config)
        assert launch is not None
        rank = launch.rank_of(self.vllm_config)
        for handle in self.workers:
            handle.proc.name = f"DWDP rank {rank} (pid {handle.proc.pid})"
