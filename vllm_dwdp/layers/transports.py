"""Which transport a rank has: as asked for, or the one that its platform and its view need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_dwdp.errors import DwdpError
from vllm_dwdp.layers.build import ModelBuild
from vllm_dwdp.transport.base import Transport
from vllm_dwdp.transport.shm import ShmTransport

if TYPE_CHECKING:
    from vllm_dwdp.group.rendezvous import Rendezvous


def page_of_group(build: ModelBuild, rendezvous: Rendezvous, group: Sequence[int], name: str = "page") -> int | None:
    """Bytes of a page where the device of every rank maps memory in pieces, which each tries with one; else None.

    name: under which ranks tell each other, another one each time. None too where the user asked for another transport, a
    rank's pages are of another size, or ranks are servers of their own, which have no composite view.
    """
    page = None
    if build.apart is not None:
        return None
    if not build.platform.on_cpu and build.config.transport in ("auto", "vmm"):
        try:
            transport = make_transport(build, (), "composite")
        except DwdpError:
            pass  # the machine refuses such memory: another view does
        else:
            page = getattr(transport, "page", None)
            transport.close()
    said = rendezvous.gather(name, page, list(group))
    return page if set(said) == {page} else None


def make_transport(build: ModelBuild, cores: tuple[int, ...], view: str) -> Transport:
    """The transport for this platform and the chosen view; raises DwdpError for one that is not there."""
    name, platform = build.config.transport, build.platform
    if name not in ("auto", *platform.transports):
        raise DwdpError(f"transport {name!r} is not available on {platform.name}: use {platform.transports[0]}")
    if platform.on_cpu:
        return ShmTransport(build.config.timeout_s, cores, keep_files=build.apart is not None)
    import torch

    from vllm_dwdp.transport.cuda_copy import CopyOptions
    from vllm_dwdp.transport.cuda_cupy import CupyDevice
    from vllm_dwdp.transport.cupy_ipc import CupyIpcTransport
    from vllm_dwdp.transport.mirrored import MirroredTransport

    options = CopyOptions(timeout_s=build.config.timeout_s)
    device = CupyDevice(torch.cuda.current_device())
    apart = build.apart is not None
    if name == "vmm" or view == "composite" or apart:
        from vllm_dwdp.transport.cuda_bindings import BindingsVmm
        from vllm_dwdp.transport.vmm import VmmTransport

        return VmmTransport(device, BindingsVmm(device.index), options, keep_descriptors=apart)
    return MirroredTransport(device, options) if name == "cuda_pinned" else CupyIpcTransport(device, options)
