"""The work of one step of one rank: its tokens and how far they look back, as numbers or as arrays of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vllm_dwdp.errors import DwdpError

_SAMPLES = 4096
_SEED = 20260401


@dataclass(frozen=True)
class Lengths:
    """Prompt lengths: uniform in [ratio * isl, isl], or normal around `isl` where `std` > 0, never under 1/16 of it."""

    isl: int
    ratio: float = 1.0
    std: float = 0.0

    def __post_init__(self) -> None:
        if self.isl < 1:
            raise DwdpError(f"the input length is {self.isl} tokens: it must be at least 1")
        if not 0 < self.ratio <= 1:
            raise DwdpError(f"the length ratio is {self.ratio}: it must be above 0 and at most 1")
        if self.std < 0:
            raise DwdpError(f"the standard deviation of the input length is {self.std}: it must not be negative")

    @property
    def mean(self) -> float:
        """Tokens."""
        return self.isl if self.std else self.isl * (1 + self.ratio) / 2

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        """Lengths in tokens, of that shape."""
        if self.std:
            return np.clip(rng.normal(self.isl, self.std, shape), self.isl / 16, None)
        return rng.uniform(self.isl * self.ratio, self.isl, shape)


class Work(NamedTuple):
    """Tokens of a step. `new`, `context`: [samples, requests], tokens to compute and tokens cached before them.

    `decode`: every request has one new token.
    """

    new: Any
    context: Any
    decode: bool = False

    @property
    def tokens(self) -> Any:
        """[samples]"""
        return self.new.sum(axis=1)

    @property
    def sequences(self) -> int:
        """Requests of the step; each needs one row of logits."""
        return int(self.new.shape[1])


def prefill(lengths: Lengths, tokens_per_step: int, whole: bool = False, cached: float = 0.0) -> Work:
    """Steps of prefill at full load.

    `whole`: floor(tokens_per_step / isl) entire prompts, as engines without chunked prefill run them. Otherwise vLLM's
    chunked prefill: every step has exactly `tokens_per_step` tokens, cut from a stream of prompts. `cached`: share of
    each prompt found in the prefix cache.
    """
    if not 0 <= cached < 1:
        raise DwdpError(f"the prefix-cache hit rate is {cached}: it must be at least 0 and below 1")
    rng = np.random.default_rng(_SEED)
    if whole:
        count = max(1, tokens_per_step // lengths.isl)
        full = lengths.draw(rng, (_SAMPLES, count))
        return Work(full * (1 - cached), full * cached)
    if lengths.ratio == 1 and not lengths.std and tokens_per_step % lengths.isl == 0 and not cached:
        count = tokens_per_step // lengths.isl
        return Work(np.full((1, count), float(lengths.isl)), np.zeros((1, count)))
    return _chunks(lengths, tokens_per_step, cached, rng)


def _chunks(lengths: Lengths, tokens: int, cached: float, rng: np.random.Generator) -> Work:
    """Steps cut from one long stream of prompts, from a random place in it."""
    least = max(1.0, lengths.isl * (lengths.ratio if not lengths.std else 0.0625) * (1 - cached))
    slots = math.ceil(tokens / least) + 2
    samples = max(4, min(_SAMPLES, 4_000_000 // slots))
    full = lengths.draw(rng, (samples, slots))
    fresh = full * (1 - cached)
    # Longer prompts are likelier to be the one that a step starts in; a uniform offset into the first is near enough.
    ends = np.cumsum(fresh, axis=1) - rng.uniform(0, 1, (samples, 1)) * fresh[:, :1]
    starts = ends - fresh
    new = np.clip(np.minimum(ends, tokens) - np.maximum(starts, 0), 0, None)
    context = full * cached + np.clip(-starts, 0, None)
    return Work(new, np.where(new > 0, context, 0.0))


def decoding(sequences: int, context: float) -> Work:
    """One new token for each of `sequences` requests with `context` tokens before it."""
    if sequences < 1:
        raise DwdpError(f"a decode step has {sequences} sequences: it needs at least 1")
    return Work(np.ones((1, sequences)), np.full((1, sequences), float(context)), decode=True)
