"""Launches of kernels that Triton has compiled already, without its search by every argument.

`JITFunction.run` specialises on each argument and compares the globals that a kernel uses, at every launch: on slow hosts
that takes as long as the rest of a small layer. A compiled kernel is launched directly here where everything that the
search would look at is the same as when it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final, NamedTuple

import torch

#: Kernels remembered; a batch size is one for either GEMM of a layer, whatever the number of layers.
MOST: Final = 4096
#: Triton asks whether pointers are multiples of it.
_ALIGNED: Final = 16


class Planned(NamedTuple):
    """function: a JIT function. constants: by name, and Triton's own options. persistent: whether it is that kernel."""

    function: Any
    grid: tuple[int]
    constants: dict[str, Any]
    persistent: bool


class Known(NamedTuple):
    """kernel: Triton's CompiledKernel. grid: of three. constants: what follows the arguments in its signature."""

    kernel: Any
    grid: tuple[int, int, int]
    constants: tuple[Any, ...]
    persistent: bool

    def launch(self, arguments: tuple[Any, ...]) -> None:
        """On the current stream."""
        self.kernel[self.grid](*arguments, *self.constants)


_known: dict[Hashable, Known] = {}
_tell: Callable[[str], None] | None = None


def watch(tell: Callable[[str], None] | None) -> None:
    """From now on `tell` is given the name of every kernel that a launch had Triton compile; None: nobody is."""
    global _tell
    _tell = tell


def held(function: Any) -> int:
    """Kernels that Triton has compiled of a function, or read from its cache on disk; 0 where it interprets."""
    return sum(len(kernels) for kernels, *_ in getattr(function, "device_caches", {}).values())


def find(key: Hashable) -> Known | None:
    """What was remembered under `key`."""
    return _known.get(key)


def aligned(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether all begin at multiples of 16 bytes: others are launched through Triton's search."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits % _ALIGNED == 0


def launch(key: Hashable | None, planned: Planned, arguments: tuple[Any, ...]) -> None:
    """Launch what is planned, and remember the compiled kernel under `key`, unless that is None.

    arguments: all that are no constants, in the signature's order.
    """
    function, grid, constants, persistent = planned
    before = held(function)
    compiled = function[grid](*arguments, **constants)
    if _tell is not None and held(function) > before:
        _tell(function.__name__)
    if key is None or compiled is None:  # None from the interpreter
        return
    if len(_known) >= MOST:
        _known.clear()
    names = function.arg_names[len(arguments) :]
    _known[key] = Known(compiled, (grid[0], 1, 1), tuple(constants[name] for name in names), persistent)
