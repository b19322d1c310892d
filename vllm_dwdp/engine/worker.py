"""What a dwdp worker does around vLLM's own: build with the share, share the experts, count, let go."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.ray.lazy_utils import is_in_ray_actor
from vllm.v1.worker.worker_base import WorkerBase

from vllm_dwdp import __version__
from vllm_dwdp.compat.versions import vllm_version
from vllm_dwdp.config import AUTO, DwdpConfig
from vllm_dwdp.engine.auto_share import check_foreseen, memory_of, page_ahead, settle
from vllm_dwdp.engine.frozen import WRITES, freeze, refuse_methods
from vllm_dwdp.engine.heap import freed_memory_is_returned
from vllm_dwdp.engine.hits_writer import HitsWriter
from vllm_dwdp.engine.loader import switch_loader
from vllm_dwdp.engine.model_config import restore_moe
from vllm_dwdp.engine.orphans import orphaned
from vllm_dwdp.engine.peers import PeerWatch, found_apart, watch_peers
from vllm_dwdp.engine.waits import Waits, watch_waits
from vllm_dwdp.errors import DwdpError
from vllm_dwdp.group.apart import ApartRendezvous
from vllm_dwdp.group.launch import DwdpLaunch, launch_of
from vllm_dwdp.group.rendezvous import Identity, Rendezvous, identity_hash
from vllm_dwdp.hits_file import Hits, write_hits
from vllm_dwdp.hold import Held, choose
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.layers.sharing import ExpertSharing
from vllm_dwdp.platform import platform_of

logger = init_logger("vllm.dwdp")

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel end this process with its engine, also where it is stopped and cannot notice itself."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Of an engine that was gone before, the kernel says nothing.
    if orphaned():
        os.kill(os.getpid(), signal.SIGKILL)


def identity_of(vllm_config: VllmConfig, launch: DwdpLaunch) -> Identity:
    """What the ranks of a group compare before they share weights."""
    model, settings = vllm_config.model_config, launch.config.to_dict()
    name, config = model.model, model.hf_config.to_dict()
    if launch.apart is not None:
        # Each may have its checkpoint elsewhere, whose bytes are compared.
        name, config = "told by its files", {key: value for key, value in config.items() if key != "_name_or_path"}
        # Each server has its own; and reads the file `popularity` when it starts.
        settings |= {"rank": None, "meet": None}
        if launch.popularity is not None:
            settings["popularity"] = identity_hash(asdict(launch.popularity))
    told = {key: value for key, value in settings.items() if value != getattr(DwdpConfig, key)}
    return Identity(
        vllm=vllm_version(),
        vllm_dwdp=__version__,
        model=name,
        model_hash=identity_hash(config),
        dtype=str(model.dtype),
        dwdp=json.dumps({**told, "ranks": launch.num_ranks}, sort_keys=True),
    )


def in_ray() -> bool:
    """Whether this worker is a Ray actor. Processes that are forked may have their program's Ray and be none."""
    return "ray" in sys.modules and is_in_ray_actor()


def in_engine(vllm_config: VllmConfig) -> bool:
    """Whether this worker runs in its engine's process."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    backend = vllm_config.parallel_config.distributed_executor_backend
    return isinstance(backend, type) and issubclass(backend, UniProcExecutor)


class DwdpWorkerMixin:
    """In front of vLLM's worker class for a platform."""

    vllm_config: VllmConfig
    model_runner: Any
    dwdp_waits: Waits
    #: What memory let this rank hold, where that decides.
    dwdp_held: Held | None = None
    #: Tokens of the step under way, or of the last one.
    dwdp_step_tokens = 0
    #: With `hits`, once the model is warm.
    dwdp_hits_writer: HitsWriter | None = None
    #: Where this rank is a server of its own.
    dwdp_peers: PeerWatch | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, WorkerBase):
            refuse_methods(cls)

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        launch = launch_of(vllm_config)
        if launch is None:
            raise DwdpError("a dwdp worker was started without a dwdp launch: use --distributed-executor-backend dwdp")
        self.dwdp_place = "its engine" if in_engine(vllm_config) else "Ray" if in_ray() else "a process of its own"
        # An engine's parent may have started it from a thread that ends early, which counts as the parent's end.
        if self.dwdp_place != "its engine":
            die_with_parent()
        restore_moe(vllm_config)
        switch_loader(vllm_config)
        self.dwdp_launch = launch
        self.dwdp_rank = launch.rank_of(vllm_config)
        self.dwdp_sharing: ExpertSharing | None = None
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's `load_model` for this rank's share, then the views of all experts.

        Raises DwdpError, beside what a start may, where the model is there already.
        """
        if self.dwdp_sharing is not None:
            raise DwdpError(f"load_model {WRITES}")
        launch, rank, started = self.dwdp_launch, self.dwdp_rank, time.monotonic()
        group = launch.group_of(rank)
        self.dwdp_rendezvous = rendezvous = self._dwdp_meet(group)
        try:
            rendezvous.check_identity(identity_of(self.vllm_config, launch), group)
            if launch.config.goes_by_memory(platform_of(current_platform)):
                launch = self._dwdp_settle(rendezvous)
            build = ModelBuild(
                launch.config,
                rank % len(group),
                len(group),
                platform_of(current_platform),
                meet=lambda name: rendezvous.gather(name, True, group),
                gather=lambda name, value: rendezvous.gather(name, value, group),
                popularity=launch.popularity,
                apart=found_apart(rendezvous, platform_of(current_platform).on_cpu),
            ).open()
            with freed_memory_is_returned() if build.platform.on_cpu else nullcontext():
                super().load_model(*args, **kwargs)  # type: ignore[misc]
                # Kernel objects are made once more, and ask for the config.
                with set_current_vllm_config(self.vllm_config):
                    self.dwdp_sharing = ExpertSharing(build, rendezvous, launch)
            sharing = self.dwdp_sharing
            logger.info("dwdp rank %d: %s", rank, sharing.describe(self.dwdp_place))
            self.dwdp_waits = watch_waits(self.vllm_config, launch, rank, sharing)
            freeze(self.model_runner)
            sharing.start()
            if isinstance(rendezvous, ApartRendezvous):
                way = "adopted" if build.adopts else "read from the checkpoint"
                logger.info("dwdp rank %d: experts %s, in %.1f s of loading", rank, way, time.monotonic() - started)
                self.dwdp_peers = watch_peers(rendezvous, sharing.counters)
        except BaseException as error:
            rendezvous.fail(error)
            raise

    def _dwdp_meet(self, group: list[int]) -> Rendezvous:
        launch, timeout_s = self.dwdp_launch, self.dwdp_launch.config.timeout_s
        if launch.apart is None:
            return Rendezvous(launch.folder, self.dwdp_rank, timeout_s)
        return ApartRendezvous(launch.folder, launch.apart, group, timeout_s)

    def dwdp_memory_limit(self) -> float:
        """Bytes that this rank may use in all from now on."""
        raise NotImplementedError

    def _dwdp_settle(self, rendezvous: Rendezvous) -> DwdpLaunch:
        """The launch with the number of experts that all ranks agree on; one line says which.

        Raises DwdpError where "auto" was asked for and memory cannot be foreseen; the default is a partition then.
        """
        said, facts, launch = "a partition, as another rank has to", None, self.dwdp_launch
        platform, asked = platform_of(current_platform), launch.config.experts_per_rank == AUTO
        page = page_ahead(self.vllm_config, launch, platform, rendezvous)
        try:
            if not asked:
                check_foreseen(self.vllm_config)
            limit = self.dwdp_memory_limit()
            facts = memory_of(self.vllm_config, launch, platform, limit, page)
            choose(facts)
        except DwdpError as error:
            if asked:
                raise
            said, facts = f"a partition, since {error}", None
        self.dwdp_launch, self.dwdp_held = settle(self.dwdp_launch, facts, rendezvous)
        said = self.dwdp_held.describe() if self.dwdp_held else said
        logger.info("dwdp rank %d: %s", self.dwdp_rank, said)
        if self.dwdp_held is None and self.dwdp_launch.popularity is not None:
            logger.warning(
                "dwdp rank %d: popularity chooses nothing in a partition; set experts_per_rank", self.dwdp_rank
            )
        return self.dwdp_launch

    def determine_available_memory(self) -> int:
        """vLLM's; a KV cache that "auto" promised and that is not there is a WARNING."""
        nbytes = int(super().determine_available_memory())  # type: ignore[misc]
        if self.dwdp_held is not None and (shortfall := self.dwdp_held.shortfall(nbytes)):
            logger.warning("dwdp rank %d: %s", self.dwdp_rank, shortfall)
        return nbytes

    def profile(self, is_start: bool = True, profile_prefix: str | None = None, **bounds: Any) -> None:
        """vLLM's `profile`, which names files by ranks within the engine: those of a launch would overwrite each other."""
        name = f"dwdp{self.dwdp_rank}"
        super().profile(is_start, f"{profile_prefix}_{name}" if profile_prefix else name, **bounds)  # type: ignore[misc]

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's; layers that its warm-up left out are named, and sealed until they are used."""
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        assert self.dwdp_sharing is not None
        if not self._dwdp_name_unused():
            # vLLM's CPU platform does not warm eager models up: the first forward shows.
            vars(self)["execute_model"] = self._dwdp_first_forward
        self.dwdp_sharing.seal_unused()
        self.dwdp_sharing.warmed_up(self.dwdp_rendezvous, self.dwdp_launch.group_of(self.dwdp_rank))
        self.dwdp_sharing.forwards.reset()
        if self.dwdp_sharing.hits is not None:
            self.dwdp_sharing.hits.reset()
            self.dwdp_hits_writer = HitsWriter(self.dwdp_sharing.hits.read, self._dwdp_write_hits, self.dwdp_rank)
            self.dwdp_hits_writer.start()
        return times

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; forwards are counted here, since replayed CUDA graphs run no code of layers."""
        if tokens := scheduler_output.total_num_scheduled_tokens:
            assert self.dwdp_sharing is not None
            self.dwdp_sharing.count(tokens)
            self.dwdp_waits.add(tokens)
            self.dwdp_step_tokens = tokens
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def _dwdp_first_forward(self, *args: Any, **kwargs: Any) -> Any:
        output = type(self).execute_model(self, *args, **kwargs)
        if self._dwdp_name_unused():
            del vars(self)["execute_model"]
        return output

    def _dwdp_name_unused(self) -> bool:
        """Warn of layers that no forward used so far; False where there was no forward."""
        sharing = self.dwdp_sharing
        assert sharing is not None
        unused, layers = sharing.unused(), len(sharing.layers)
        if len(unused) == layers:
            return False
        if unused:
            logger.warning(
                "dwdp rank %d: %d of %d MoE layers were left out by the first forward: %s; until dwdp is asked for their "
                "weights, they %s",
                self.dwdp_rank,
                len(unused),
                layers,
                ", ".join(unused),
                "are read in place" if sharing.view == "inplace" else "are NaN, or their kernel raises",
            )
        return True

    def dwdp_counters(self) -> dict[str, Any]:
        """This rank's counters; for `collective_rpc`."""
        assert self.dwdp_sharing is not None
        return self.dwdp_sharing.snapshot()

    def dwdp_hits(self) -> dict[str, Any]:
        """Write this rank's part of the file `dwdp.hits` and return it, as `Hits` by field; for `collective_rpc`.

        Raises DwdpError where nothing is counted, or the file cannot be written.
        """
        if self.dwdp_hits_writer is None:
            raise DwdpError('no hits are counted: start with additional_config {"dwdp": {"hits": FILE}}')
        return asdict(self.dwdp_hits_writer.now())

    def _dwdp_write_hits(self, hits: Hits) -> None:
        path, model = self.dwdp_launch.config.hits, self.vllm_config.model_config.model
        assert path is not None
        write_hits(path, self.dwdp_launch.name, model, self.dwdp_rank, hits)

    def shutdown(self) -> None:
        """Write hits; let go of peers' memory, then of the own. What this rank did is logged by the front end."""
        if self.dwdp_sharing is not None:
            if self.dwdp_hits_writer is not None:
                self.dwdp_hits_writer.close()
            if self.dwdp_peers is not None:
                self.dwdp_peers.stop()
            self.dwdp_sharing.close()
            self.dwdp_sharing = None
            if self.dwdp_peers is not None:
                self.dwdp_peers.leave()
        super().shutdown()  # type: ignore[misc]
