"""Which numbers of tokens have kernels of their own: what of a launch Triton compiles apart, told without any tensor."""

from __future__ import annotations

from collections.abc import Hashable

from .arguments import padded_routes
from .block_order import order
from .tiles import Tiles
from .torch_ops import are_single, room_for_routes

#: Triton compiles apart what is and what is not a multiple of it, and what is 1.
_MULTIPLE = 16


def compiled_apart(tiles: Tiles, tokens: int, top_k: int, experts: int, travels: bool = False) -> Hashable:
    """Equal for two numbers of tokens of one layer and way only where both its GEMMs launch the same kernels."""
    routes = tokens * top_k
    single = not travels and are_single(routes, experts)
    room = None if single else room_for_routes(routes, tiles.block_m, experts)
    numbers = [routes, *(padded_routes(room, rows, routes, tiles.block_m) for rows in (tokens, routes))]
    # A row alone has one scale, which looks like that of a whole tensor.
    alone = tokens == 1, routes == 1
    return tiles, tuple(_kind(number) for number in numbers), alone, single, *order(routes * single, tiles).values()


def _kind(number: int) -> int:
    return 1 if number == 1 else 16 * (number % _MULTIPLE == 0)
