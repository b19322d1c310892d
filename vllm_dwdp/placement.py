"""Who holds which expert, and from whom each rank reads the experts that it does not hold (pure).

Think of the E experts as a ring. Rank r holds the interval of S experts that starts at floor(r*E/N); with S = E/N the
intervals tile the ring, with more they overlap. (TensorRT-LLM's placement is the same but clipped at E, so that the
last experts are held less often, and it demands (N-1)*D + S == E.)

Reader r misses an arc of E - S experts, which begins where its own interval ends. It cuts the arc into N-1 runs, the
j-th of which is served by rank r+j; c_0 <= ... <= c_{N-1} are the cuts, counted from the begin of the arc. Rank r+j
holds its run where start_{r+j} <= start_r + S + c_{j-1} and c_j <= start_{r+j} - start_r. With m = (E - S)/(N - 1) and
D = E/N:

* c_j = floor(rD + j*m) - floor(rD) always satisfies both: without the floors they reduce to D <= S, and floor is
  monotone. Runs are then floor(m) or ceil(m) experts long, so that the sources of a reader are equal to within one
  expert, for every D <= S < E; the N readers together take equally much from each source to within N - 1 experts.
* Cuts that are the same for all readers make these totals exactly E - S each. Then c_j must lie between
  ceil((j+1)D) - S and floor(jD), with steps of floor(m) or ceil(m). Such cuts are taken where there are any: in all
  cases tested with S > ceil(D), and in some with S = ceil(D).

Every source serves a reader one run of consecutive experts.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from vllm_dwdp.errors import DwdpError


class Run(NamedTuple):
    """Experts with consecutive ids that one reader takes from one owner, where they are consecutive as well."""

    owner: int  # rank within the group; the reader itself for resident experts
    first: int  # id of the first expert
    local: int  # position of that expert in the owner's share, in experts
    length: int  # experts


@dataclass(frozen=True)
class Placement:
    """The placement of one MoE layer's routed experts over the ranks 0..N-1 of a group.

    shares: [rank] -> ids of the resident experts, ascending, which is their order in the slab.
    owners: [reader][expert] -> the rank the reader takes the expert from; itself where the expert is resident.
    """

    num_experts: int
    num_ranks: int
    shares: tuple[tuple[int, ...], ...]
    owners: tuple[tuple[int, ...], ...]

    @cached_property
    def _local(self) -> tuple[dict[int, int], ...]:
        return tuple({expert: i for i, expert in enumerate(share)} for share in self.shares)

    def local(self, rank: int, expert: int) -> int:
        """Position of `expert` in the share of `rank`; KeyError where it is not resident."""
        return self._local[rank][expert]

    def missing(self, reader: int) -> tuple[int, ...]:
        """Ids of the experts that `reader` has to fetch, ascending."""
        return tuple(expert for expert, owner in enumerate(self.owners[reader]) if owner != reader)

    def loads(self, reader: int) -> tuple[int, ...]:
        """[rank] -> number of experts that it serves to `reader`; 0 for the reader itself."""
        counts = [0] * self.num_ranks
        for owner in self.owners[reader]:
            counts[owner] += owner != reader
        return tuple(counts)

    def runs(self, reader: int) -> tuple[Run, ...]:
        """All E experts as the fewest runs, in ascending order of their ids, resident ones included."""
        runs: list[Run] = []
        for expert, owner in enumerate(self.owners[reader]):
            local = self._local[owner][expert]
            if runs and runs[-1].owner == owner and runs[-1].local + runs[-1].length == local:
                runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
            else:
                runs.append(Run(owner, expert, local, 1))
        return tuple(runs)


def check_share(num_experts: int, num_ranks: int, experts_per_rank: int | None) -> None:
    """Raise DwdpError unless N ranks with `experts_per_rank` experts each (None: a partition) can hold E experts."""
    if num_ranks < 2:
        raise DwdpError(f"a group has {num_ranks} rank(s) but DWDP needs at least 2: raise --data-parallel-size")
    if num_ranks > num_experts:
        raise DwdpError(
            f"a group of {num_ranks} ranks cannot share {num_experts} experts: every rank needs one; "
            f"set dwdp.group_size to {num_experts} or less"
        )
    least = -(-num_experts // num_ranks)
    if experts_per_rank is None or least <= experts_per_rank < num_experts:
        return
    if experts_per_rank < least:
        raise DwdpError(
            f"dwdp.experts_per_rank is {experts_per_rank} but {num_ranks} ranks need at least {least} each to hold "
            f"{num_experts} experts: set it to {least}..{num_experts - 1} or leave it out"
        )
    raise DwdpError(
        f"dwdp.experts_per_rank is {experts_per_rank} of {num_experts} experts, so nothing is left to fetch: "
        f"set it to {least}..{num_experts - 1}, leave it out, or use plain data parallelism"
    )


@lru_cache(maxsize=64)
def place(num_experts: int, num_ranks: int, experts_per_rank: int | None = None, granularity: int = 1) -> Placement:
    """Place E experts on the N ranks of a group.

    experts_per_rank: None gives a partition, each share starting at floor(r*E/N), of floor(E/N) or ceil(E/N) experts;
        a number S gives every rank exactly S experts.
    granularity: g > 1 makes shares and runs begin and end on multiples of g experts (or at E), for pages that two
        owners must not share. The ring then consists of ceil(E/g) blocks, S is rounded up to blocks, and 'within one
        expert' becomes 'within one block'; the last block may be short.
    Raises DwdpError for numbers that `check_share` refuses, or when there are fewer blocks than ranks.
    """
    check_share(num_experts, num_ranks, experts_per_rank)
    blocks = _count_blocks(num_experts, num_ranks, granularity)
    held = None if experts_per_rank is None else -(-experts_per_rank // granularity)
    if held is not None and held >= blocks:
        raise DwdpError(
            f"dwdp.experts_per_rank is {experts_per_rank}, in blocks of {granularity} all {num_experts} experts: "
            f"set it to {(blocks - 1) * granularity} or less, or use the contiguous view"
        )
    if held is None or held * num_ranks == blocks:
        block_owners = _partition(num_experts, num_ranks, granularity, held)
    else:
        block_owners = _overlap(blocks, num_ranks, held)
    shares = tuple(
        tuple(expert for expert in range(num_experts) if owners[expert // granularity] == rank)
        for rank, owners in enumerate(block_owners)
    )
    expert_owners = tuple(
        tuple(owners[expert // granularity] for expert in range(num_experts)) for owners in block_owners
    )
    return Placement(num_experts, num_ranks, shares, expert_owners)


def boundary_shift(num_experts: int, num_ranks: int, granularity: int) -> int:
    """Experts by which `granularity` moves a boundary of the partition at most, against granularity 1.

    Raises DwdpError as `place` does.
    """
    check_share(num_experts, num_ranks, None)
    _count_blocks(num_experts, num_ranks, granularity)
    coarse = _boundaries(num_experts, num_ranks, granularity)
    return max(abs(a - b) for a, b in zip(coarse, _boundaries(num_experts, num_ranks, 1), strict=True))


def _count_blocks(num_experts: int, num_ranks: int, granularity: int) -> int:
    if granularity < 1:
        raise DwdpError(f"granularity is {granularity} experts: it must be >= 1")
    blocks = -(-num_experts // granularity)
    if blocks < num_ranks:
        raise DwdpError(
            f"{num_experts} experts in blocks of {granularity} make {blocks} blocks for {num_ranks} ranks: "
            "use a smaller group, or the contiguous view, which needs no blocks"
        )
    return blocks


def _boundaries(num_experts: int, num_ranks: int, granularity: int) -> list[int]:
    """[N + 1] first experts of the shares, and E: floor(r*E/N) moved to the nearest multiple of the granularity."""
    blocks = -(-num_experts // granularity)
    cuts = [0]
    for rank in range(1, num_ranks):
        nearest = (rank * num_experts // num_ranks + granularity // 2) // granularity
        # Rounding may leave a share empty where the last block is short: keep a block for every rank on both sides.
        cuts.append(max(cuts[-1] + 1, min(nearest, blocks - (num_ranks - rank))))
    return [cut * granularity for cut in cuts] + [num_experts]


def _partition(num_experts: int, num_ranks: int, granularity: int, held: int | None) -> list[list[int]]:
    """[reader][block] -> owner, the same for every reader: each block has one holder."""
    if held is None:
        cuts = [-(-cut // granularity) for cut in _boundaries(num_experts, num_ranks, granularity)]
    else:
        cuts = [rank * held for rank in range(num_ranks + 1)]
    owners = [rank for rank in range(num_ranks) for _ in range(cuts[rank + 1] - cuts[rank])]
    return [owners] * num_ranks


def _overlap(blocks: int, num_ranks: int, held: int) -> list[list[int]]:
    """[reader][block] -> owner, for shares of `held` blocks each; see the head of this file."""
    common = _common_cuts(blocks, num_ranks, held)
    owners: list[list[int]] = []
    for reader in range(num_ranks):
        cuts = common or _reader_cuts(blocks, num_ranks, held, reader)
        begin = reader * blocks // num_ranks + held
        row = [reader] * blocks
        for j in range(1, num_ranks):
            for position in range(begin + cuts[j - 1], begin + cuts[j]):
                row[position % blocks] = (reader + j) % num_ranks
        owners.append(row)
    return owners


def _common_cuts(blocks: int, num_ranks: int, held: int) -> list[int] | None:
    """Cuts that fit every reader, so that the totals of all sources are equal; None where there are none."""
    sources = num_ranks - 1
    arc = blocks - held
    least, most = arc // sources, -(-arc // sources)
    # The values that c_j can reach are an interval, since a run may have `least` blocks or one more.
    reach = [(0, 0)]
    for j in range(1, num_ranks):
        low, high = (-(-(j + 1) * blocks // num_ranks) - held, j * blocks // num_ranks) if j < sources else (arc, arc)
        reach.append((max(low, reach[-1][0] + least), min(high, reach[-1][1] + most)))
        if reach[-1][0] > reach[-1][1]:
            return None
    cuts = [arc]
    for _, high in reversed(reach[:-1]):
        cuts.append(min(high, cuts[-1] - least))
    return cuts[::-1]


def _reader_cuts(blocks: int, num_ranks: int, held: int, reader: int) -> list[int]:
    """floor(rD + j*m) - floor(rD), as exact fractions over N*(N-1)."""
    sources = num_ranks - 1
    begin = reader * blocks // num_ranks
    return [
        (reader * blocks * sources + j * (blocks - held) * num_ranks) // (num_ranks * sources) - begin
        for j in range(num_ranks)
    ]
