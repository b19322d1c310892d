"""Kernels of tokens that travel: a forward asks owners to compute their experts for its tokens, and waits for so long.

    requester                                          owner
    ask: tokens, routes, router weights -> its mailbox, then rings its bell (memory of the host that a thread polls)
    own experts                                        take: tables of that layer; its experts; rows -> requester's memory
    wait: for the flags, up to a limit    <----------  answer: sets the requester's flag
    experts of owners that did not answer, read where they lie
    merge: rows of those that did

Nobody writes where another may still read: a mailbox and the rows of its answer are used again only once the flag has told
that the last answer is complete, however late it came. An owner that let a requester wait is not asked for a while.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of a requester's state, int32 [STATE_ROWS, ranks]. Only `wait` decides who is asked next; `ask` goes by it.
OPEN: tl.constexpr = tl.constexpr(0)  # whether the next `ask` asks this owner
SENT: tl.constexpr = tl.constexpr(1)  # number of the last request to it
ANSWERED: tl.constexpr = tl.constexpr(2)  # whether it answered in time
SKIP: tl.constexpr = tl.constexpr(3)  # so many layers before it is asked again
BACK_OFF: tl.constexpr = tl.constexpr(4)  # layers to skip after the next answer that is late
ASKED: tl.constexpr = tl.constexpr(5)  # requests so far; both wrap
LATE: tl.constexpr = tl.constexpr(6)  # of them without an answer in time
ENABLED: tl.constexpr = tl.constexpr(7)  # in column 0: 0 asks nobody. In column 1: programs of `ask` that are done
STATE_ROWS = 8

#: Layers that an owner is left alone after a late answer: doubled each time, up to the second.
FIRST_SKIP, MOST_SKIP = 4, 256

# A mailbox: two int32, then routes, weights, scales and tokens at the offsets of `MailLayout`.
NUMBER: tl.constexpr = tl.constexpr(0)
LAYER: tl.constexpr = tl.constexpr(1)


@triton.jit
def _ring(address, value, INTERPRETED: tl.constexpr):
    """Store int64 `value` where a thread of the owner's host polls, behind everything that this program has stored."""
    tl.debug_barrier()
    if INTERPRETED:
        tl.store(address.to(tl.pointer_type(tl.int64)), value)
    else:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; st.relaxed.sys.global.u64 [$1], $2; mov.u32 $0, 0;", "=r,l,l", [address, value],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _now_ns(INTERPRETED: tl.constexpr):
    """The device's clock; one value for all threads, or they would leave a loop at different times."""
    if INTERPRETED:
        now = tl.full((), 0, tl.int64)
    else:
        each = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l,r", [tl.arange(0, 32)], dtype=tl.int64, is_pure=False, pack=1
        )
        now = tl.max(each, 0)
    return now


@triton.jit(do_not_specialize=["num_tokens", "room", "bucket", "layer"])
def ask_kernel(
    tokens_ptr, scales_ptr, ids_ptr, weights_ptr, owners_ptr, own_ids_ptr, state_ptr, mails_ptr, bells_ptr,
    num_tokens, stride_t, stride_st, stride_sg, room, bucket, layer,
    E: tl.constexpr, HIDDEN: tl.constexpr, GROUPS: tl.constexpr, TOP_K: tl.constexpr,
    ME: tl.constexpr, RANKS: tl.constexpr,
    IDS_AT: tl.constexpr, WEIGHTS_AT: tl.constexpr, SCALES_AT: tl.constexpr, TOKENS_AT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A token per program; the last one rings. Routes of others than the one they are meant for are E, which no sorting
    takes, as are those of tokens that vLLM pads with (-1). Programs from num_tokens to `room` write routes only: the owner
    computes batches of `room`.

    GROUPS: scales of a token, which FP8 has; 0 for none."""
    token = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    inside = k < TOP_K
    valid = k < tl.where(token < num_tokens, TOP_K, 0)
    at = token * TOP_K + k
    ids = tl.load(ids_ptr + at, mask=valid, other=0).to(tl.int32)
    weights = tl.load(weights_ptr + at, mask=valid, other=0.0)
    owners = tl.load(owners_ptr + ids, mask=valid & (ids >= 0), other=-1)
    tl.store(own_ids_ptr + at, tl.where(owners == ME, ids, E), mask=inside)
    for rank in tl.static_range(RANKS):
        if rank != ME:  # noqa: SIM102  (a constant)
            if tl.load(state_ptr + OPEN * RANKS + rank) != 0:
                mail = tl.load(mails_ptr + rank)
                tl.store(
                    (mail + IDS_AT).to(tl.pointer_type(tl.int32)) + at, tl.where(owners == rank, ids, E), mask=inside
                )
                tl.store((mail + WEIGHTS_AT).to(tl.pointer_type(tl.float32)) + at, weights, mask=inside)
                if token < num_tokens:
                    if GROUPS > 0:
                        g = tl.arange(0, BLOCK_G)
                        scale = tl.load(scales_ptr + token * stride_st + g * stride_sg, mask=g < GROUPS)
                        to = (mail + SCALES_AT).to(tl.pointer_type(tl.float32)) + token * GROUPS + g
                        tl.store(to, scale, mask=g < GROUPS)
                    row = (mail + TOKENS_AT).to(tl.pointer_type(tokens_ptr.dtype.element_ty)) + token * HIDDEN
                    for begin in range(0, HIDDEN, BLOCK_H):
                        h = begin + tl.arange(0, BLOCK_H)
                        part = tl.load(tokens_ptr + token * stride_t + h, mask=h < HIDDEN)
                        tl.store(row + h, part, mask=h < HIDDEN)
    tl.debug_barrier()
    done_ptr = state_ptr + ENABLED * RANKS + 1
    if tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="sys") == room - 1:
        tl.store(done_ptr, 0)
        for rank in tl.static_range(RANKS):
            if rank != ME:  # noqa: SIM102  (a constant)
                if tl.load(state_ptr + OPEN * RANKS + rank) != 0:
                    number = tl.load(state_ptr + SENT * RANKS + rank) + 1
                    tl.debug_barrier()
                    tl.store(state_ptr + SENT * RANKS + rank, number)
                    asked = state_ptr + ASKED * RANKS + rank
                    tl.store(asked, tl.load(asked) + 1)
                    mail = tl.load(mails_ptr + rank).to(tl.pointer_type(tl.int32))
                    tl.store(mail + NUMBER, number)
                    tl.store(mail + LAYER, layer)
                    _ring(tl.load(bells_ptr + rank), number.to(tl.int64) * 256 + bucket, INTERPRETED)


@triton.jit(do_not_specialize=["num_routes", "bucket"])
def wait_kernel(
    ids_ptr, owners_ptr, late_ids_ptr, state_ptr, flags_ptr, limits_ptr, num_routes, bucket,
    E: tl.constexpr, ME: tl.constexpr, RANKS: tl.constexpr, FIRST: tl.constexpr, MOST: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program of one warp: waits up to the limit of a bucket, nanoseconds for all owners together, and leaves as
    late_ids the routes that nobody computes (E for all others). Interpreted it does not wait."""
    begun = _now_ns(INTERPRETED)
    limit = tl.load(limits_ptr + bucket)
    enabled = tl.load(state_ptr + ENABLED * RANKS)
    for rank in tl.static_range(RANKS):
        if rank != ME:
            asked = tl.load(state_ptr + OPEN * RANKS + rank)
            sent = tl.load(state_ptr + SENT * RANKS + rank)
            skip = tl.load(state_ptr + SKIP * RANKS + rank)
            back_off = tl.load(state_ptr + BACK_OFF * RANKS + rank)
            lates = tl.load(state_ptr + LATE * RANKS + rank)
            seen = tl.atomic_add(flags_ptr + rank, 0, sem="acquire", scope="sys")
            if not INTERPRETED:
                while (asked != 0) & (seen != sent) & (_now_ns(INTERPRETED) - begun < limit):
                    seen = tl.atomic_add(flags_ptr + rank, 0, sem="acquire", scope="sys")
            here = (seen == sent).to(tl.int32)
            answered = (asked != 0).to(tl.int32) * here
            missed = (asked != 0).to(tl.int32) * (1 - here)
            skip = tl.where(missed != 0, back_off, tl.maximum(skip - 1, 0))
            longer = tl.minimum(back_off * 2, MOST)
            back_off = tl.where(missed != 0, longer, tl.where(answered != 0, FIRST, back_off))
            opens = (enabled != 0) & (here != 0) & (skip == 0)
            tl.debug_barrier()
            tl.store(state_ptr + ANSWERED * RANKS + rank, answered)
            tl.store(state_ptr + SKIP * RANKS + rank, skip)
            tl.store(state_ptr + BACK_OFF * RANKS + rank, back_off)
            tl.store(state_ptr + LATE * RANKS + rank, lates + missed)
            tl.store(state_ptr + OPEN * RANKS + rank, opens.to(tl.int32))
    tl.debug_barrier()
    for begin in range(0, num_routes, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < num_routes
        ids = tl.load(ids_ptr + at, mask=inside, other=0).to(tl.int32)
        owners = tl.load(owners_ptr + ids, mask=inside & (ids >= 0), other=ME)
        done = tl.load(state_ptr + ANSWERED * RANKS + owners)
        tl.store(late_ids_ptr + at, tl.where((owners == ME) | (done != 0), E, ids), mask=inside)


@triton.jit
def merge_kernel(
    ids_ptr, owners_ptr, state_ptr, answers_ptr, out_ptr, stride_o,
    ME: tl.constexpr, RANKS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A route per program: its row from the answer of its owner, where that is there; zeros for a token that pads, whose
    rows nobody has written."""
    route = tl.program_id(0)
    expert = tl.load(ids_ptr + route).to(tl.int32)
    owner = tl.load(owners_ptr + expert, mask=expert >= 0, other=ME)
    out = out_ptr + route.to(tl.int64) * stride_o
    if expert < 0:
        for begin in range(0, HIDDEN, BLOCK_H):
            h = begin + tl.arange(0, BLOCK_H)
            tl.store(out + h, tl.zeros((BLOCK_H,), out_ptr.dtype.element_ty), mask=h < HIDDEN)
    if owner != ME:  # noqa: SIM102
        if tl.load(state_ptr + ANSWERED * RANKS + owner) != 0:
            rows = tl.load(answers_ptr + owner).to(tl.pointer_type(out_ptr.dtype.element_ty))
            for begin in range(0, HIDDEN, BLOCK_H):
                h = begin + tl.arange(0, BLOCK_H)
                row = tl.load(rows + route.to(tl.int64) * HIDDEN + h, mask=h < HIDDEN)
                tl.store(out + h, row, mask=h < HIDDEN)


@triton.jit
def take_kernel(mail_ptr, sources_ptr, targets_ptr, words_ptr, count, BLOCK: tl.constexpr):
    """Copy what the kernels need of the layer that is asked for: sources int64 [layers, count], targets and words int64
    [count]; program (i, j) copies piece j of the i-th, in words of four bytes."""
    which, piece = tl.program_id(0), tl.program_id(1)
    layer = tl.load(mail_ptr + LAYER)
    source = tl.load(sources_ptr + layer.to(tl.int64) * count + which).to(tl.pointer_type(tl.int32))
    target = tl.load(targets_ptr + which).to(tl.pointer_type(tl.int32))
    at = piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(words_ptr + which)
    tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


@triton.jit
def answer_kernel(mail_ptr, flag_ptr):
    """Tell the requester that all rows of its request are in its memory."""
    number = tl.load(mail_ptr + NUMBER)
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, number, sem="release", scope="sys")
