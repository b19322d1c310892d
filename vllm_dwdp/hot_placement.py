"""Placement by popularity: what a rank holds beyond its E/N experts are those that are hit most (pure).

Every rank keeps its interval of the partition, and everybody reads an expert from the rank whose interval it is in. Of each
other interval a rank lacks the same number of experts, to within one, so that the sources of a reader stay equal: the
least hit ones of that interval. Where one expert more is lacking of some intervals than of others, it is lacking where that
costs least.
"""

from collections.abc import Sequence

from vllm_dwdp.placement import Placement, place


def missing_hits(placement: Placement, reader: int, hits: Sequence[int]) -> int:
    """Hits of the experts that `reader` lacks; `hits`: [expert] -> tokens that were sent to it.

    Times the bytes of an expert that is what forwards of one token each read from peers, where they read experts in place;
    larger ones read an expert once for all their tokens, so less.
    """
    return sum(hits[expert] for expert in placement.missing(reader))


def place_hot(num_experts: int, num_ranks: int, experts_per_rank: int, hits: Sequence[int]) -> Placement:
    """Place E experts on the N ranks of a group, S on each, by `hits` ([expert] -> tokens that were sent to it).

    Never more hits are missing, over all readers, than with `place`, whose placement is kept where nothing is gained.
    Raises DwdpError for numbers that `check_share` refuses.
    """
    plain = place(num_experts, num_ranks, experts_per_rank)
    owner = place(num_experts, num_ranks).owners[0]
    rows = []
    for reader in range(num_ranks):
        lacking = _lacking(owner, reader, num_ranks, num_experts - experts_per_rank, hits)
        rows.append(tuple(owner[expert] if expert in lacking else reader for expert in range(num_experts)))
    shares = tuple(
        tuple(expert for expert in range(num_experts) if row[expert] == rank) for rank, row in enumerate(rows)
    )
    hot = Placement(num_experts, num_ranks, shares, tuple(rows))
    return min((plain, hot), key=lambda found: sum(missing_hits(found, rank, hits) for rank in range(num_ranks)))


def _lacking(owner: Sequence[int], reader: int, num_ranks: int, count: int, hits: Sequence[int]) -> set[int]:
    """The `count` experts that `reader` lacks, equally many of every other interval, to within one."""
    least, more = divmod(count, num_ranks - 1)
    # Beginning with the next rank, as pulls do: where hits are equal, readers lack one more of different ranks.
    sources = [(reader + step) % num_ranks for step in range(1, num_ranks)]
    coldest = [
        sorted((expert for expert, held in enumerate(owner) if held == source), key=lambda expert: hits[expert])
        for source in sources
    ]
    lacking = {expert for interval in coldest for expert in interval[:least]}
    # Intervals differ by an expert, so there may be none left in some; S >= E/N leaves enough in the others.
    next_coldest = [interval[least] for interval in coldest if len(interval) > least]
    return lacking | set(sorted(next_coldest, key=lambda expert: hits[expert])[:more])
