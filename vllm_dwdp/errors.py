"""The errors of the plugin: one line each, with the numbers that are wrong and what to do about them."""

from typing import Final

#: Ends an error that comes from the machine rather than from a setting.
DOCTOR: Final = "; run `vllm-dwdp doctor`"


def install(extra: str) -> str:
    """How to get what one of the project's extras brings; no package index has the project."""
    return f"pip install '.[{extra}]' in vllm-dwdp's folder"


class DwdpError(ValueError):
    """A configuration or a set-up that cannot work."""


class DwdpTimeout(DwdpError):
    """A wait reached its limit (`timeout_s`)."""


class PeerLost(DwdpError):
    """The process that owns a slab or a counter page is gone, or no longer offers it."""
