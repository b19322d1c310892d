"""Where the parts of a request lie in a mailbox."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

_ALIGNED = 256


class MailLayout(NamedTuple):
    """Offsets in a mailbox, and in the memory of an answer, for batches of at most `room` tokens.

    groups: float32 scales of a token, 0 where tokens are not quantised. token_type: of what travels; row_type: of answers.
    """

    room: int
    top_k: int
    hidden: int
    groups: int
    token_type: torch.dtype
    row_type: torch.dtype

    @property
    def ids_at(self) -> int:
        return _ALIGNED

    @property
    def weights_at(self) -> int:
        return self.ids_at + _aligned(4 * self.room * self.top_k)

    @property
    def scales_at(self) -> int:
        return self.weights_at + _aligned(4 * self.room * self.top_k)

    @property
    def tokens_at(self) -> int:
        return self.scales_at + _aligned(4 * self.room * self.groups)

    @property
    def mail_bytes(self) -> int:
        """Of a mailbox."""
        return self.tokens_at + _aligned(self.room * self.hidden * self.token_type.itemsize)

    @property
    def rows_bytes(self) -> int:
        """Of the rows of an answer."""
        return _aligned(self.room * self.top_k * self.hidden * self.row_type.itemsize)

    def part(self, mail: torch.Tensor, at: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """[shape] of `mail`, uint8 [mail_bytes], from byte `at` on."""
        return mail[at:][: prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
