"""Tiles for weights that lie in peers' memory."""

from .configs import tiles_for as direct_tiles_for

__all__ = ["direct_tiles_for"]
