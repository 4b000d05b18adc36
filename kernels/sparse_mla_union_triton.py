"""Merge the key lists of adjacent queries, so that a latent that several of them select is gathered once.

A group of G queries gets one list: the union of its members' keys in ascending order, each entry
`key | owners << shift` with one bit a member. Lists that are not strictly ascending (-1 anywhere but at the end,
repeated keys) are laid end to end instead, each entry owned by its own query: longer, equally exact.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_GROUP = 8
# Two programs a multiprocessor: the kernel waits for memory most of the time.
MERGE_WARPS, MERGE_REGISTERS = 16, 64


def owner_shift(group: int) -> int:
    """Position of the first ownership bit in a packed int32 entry; the sign bit stays free for -1."""
    return 31 - group


def group_size(heads: int, rows: int, queries: int, topk: int, slots: int) -> int:
    """Adjacent queries whose heads fill `rows`; 1 where merged lists of `topk` of `slots` keys would not fit."""
    group = max(1, min(MAX_GROUP, rows // heads, queries))
    return group if slots <= 1 << owner_shift(group) and group * topk < 1 << 15 else 1


def merge_key_lists(indices: torch.Tensor, group: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged lists of every `group` adjacent queries.

    Args:
        indices: int32 of shape `[B, S, K]`, -1 where a query has fewer keys.
        group: queries a list, 2 to `MAX_GROUP`.
        slots: number of key slots; at most `1 << owner_shift(group)`.

    Returns:
        Packed entries, int32 of shape `[B, ceil(S / group), group * K]` of which only the leading ones are written,
        and their number, int32 of shape `[B, ceil(S / group)]`.
    """
    B, S, K = indices.shape
    if not 1 < group <= MAX_GROUP or slots > 1 << owner_shift(group):
        raise ValueError(f"cannot pack {group} owners and {slots} slots into 31 bits")
    if group * K >= 1 << 15:
        raise ValueError(f"merged lists are limited to 32767 entries, got {group} queries of {K}")
    lists = triton.cdiv(S, group)
    packed = torch.empty(B, lists, group * K, dtype=torch.int32, device=indices.device)
    counts = torch.empty(B, lists, dtype=torch.int32, device=indices.device)
    # Per member: gaps, and in 16 bits its new keys before each entry, its places and the last member's search results.
    gaps = torch.zeros(B, lists, group, K + 1, dtype=torch.int32, device=indices.device)
    scratch = torch.empty(B, lists, group, 3, K + 1, dtype=torch.int16, device=indices.device)
    block_k = triton.next_power_of_2(K)
    _merge_key_lists_kernel[(B * lists,)](
        indices,
        packed,
        counts,
        gaps,
        scratch,
        S,
        K,
        lists,
        0,
        *indices.stride()[:2],
        GROUP=group,
        OWNER_SHIFT=owner_shift(group),
        BLOCK_K=block_k,
        num_warps=MERGE_WARPS if block_k >= 32 * MERGE_WARPS else 1,
        maxnreg=MERGE_REGISTERS,
    )
    return packed, counts


if triton is not None:

    @triton.jit
    def _merge_key_lists_kernel(
        indices,
        packed,
        counts,
        gaps,
        scratch,
        S,
        K,
        lists,
        zero,
        stride_b,
        stride_s,
        GROUP: tl.constexpr,
        OWNER_SHIFT: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        # A key is new in the first member that lists it, and is placed behind every new key below it: those of its own
        # member, of earlier members (found by searching them) and of later ones (which leave a mark in the gap of the
        # searched member where they belong: 1 if they are new, their ownership bit if they are not).
        list_id = tl.program_id(0).to(tl.int64)
        first = (list_id % lists) * GROUP
        members = tl.minimum(S - first, GROUP)
        rows = indices + (list_id // lists) * stride_b + first * stride_s
        packed += list_id * GROUP * K
        gaps += list_id * GROUP * (K + 1)
        before = scratch + list_id * GROUP * 3 * (K + 1)  # new keys before an entry
        places = before + GROUP * (K + 1)  # -1 if not new
        found_at = places + GROUP * (K + 1)
        # One layout, an entry a thread, for contiguous and gathered accesses alike: `zero` hides the contiguity, for
        # which the compiler would change the layout through shared memory at every access.
        offs = tl.arange(0, BLOCK_K) ^ zero

        ascending = 1
        for g in tl.static_range(GROUP):
            key = tl.load(rows + g * stride_s + offs, mask=offs < tl.where(g < members, K, 0), other=-1)
            after = tl.load(rows + g * stride_s + offs + 1, mask=offs + 1 < tl.where(g < members, K, 0), other=-1)
            wrong = (after >= 0) & ((key < 0) | (after <= key))
            ascending = ascending & (1 - tl.max(wrong.to(tl.int32), 0))

        if ascending != 0:
            total = 0
            for g in tl.static_range(GROUP):
                tl.debug_barrier()
                key = tl.load(rows + g * stride_s + offs, mask=offs < tl.where(g < members, K, 0), other=-1)
                new = (key >= 0).to(tl.int32)
                earlier = tl.zeros([BLOCK_K], tl.int32)
                for h in tl.static_range(g):
                    # Rows past the last query have no keys to place: search any row instead of theirs.
                    row = rows + tl.minimum(h, members - 1) * stride_s
                    at = _lower_bound(row, key, K, BLOCK_K)
                    found = (tl.load(row + at, mask=(at < K) & (new != 0), other=-1) == key) & (new != 0)
                    earlier += tl.load(before + h * (K + 1) + at, mask=new != 0, other=0).to(tl.int32)
                    tl.atomic_add(gaps + h * (K + 1) + at, 1 << (24 + g), mask=found, sem="relaxed")
                    new = tl.where(found, 0, new)
                    if h < g - 1:
                        tl.store(found_at + h * (K + 1) + offs, at.to(tl.int16), mask=offs < K)
                    else:
                        tl.atomic_add(gaps + h * (K + 1) + at, 1, mask=new != 0, sem="relaxed")
                if g > 1:
                    tl.debug_barrier()
                for h in tl.static_range(g - 1):
                    at = tl.load(found_at + h * (K + 1) + offs, mask=new != 0, other=0).to(tl.int32)
                    tl.atomic_add(gaps + h * (K + 1) + at, 1, mask=new != 0, sem="relaxed")
                running = tl.cumsum(new, 0)
                tl.store(before + g * (K + 1) + offs, (running - new).to(tl.int16), mask=offs < K)
                added = tl.max(running, 0)
                tl.store(before + g * (K + 1) + K, added.to(tl.int16))
                place = tl.where(new != 0, earlier + running - new, -1)
                tl.store(places + g * (K + 1) + offs, place.to(tl.int16), mask=offs < K)
                total += added
            tl.store(counts + list_id, total)
            tl.debug_barrier()
            for g in tl.static_range(GROUP):
                place = tl.load(places + g * (K + 1) + offs, mask=offs < K, other=-1).to(tl.int32)
                key = tl.load(rows + g * stride_s + offs, mask=place >= 0, other=-1)
                # Atomics act in L2: do not read what L1 may hold of a neighbour's line.
                gap = tl.load(gaps + g * (K + 1) + offs, mask=offs < K, other=0, cache_modifier=".cg")
                later = tl.cumsum(gap & 0xFFFFFF, 0)
                owners = ((gap >> 24) & 0xFF) | (1 << g)
                tl.store(packed + place + later, key | (owners << OWNER_SHIFT), mask=place >= 0)
        else:
            for g in tl.static_range(GROUP):
                key = tl.load(rows + g * stride_s + offs, mask=offs < tl.where(g < members, K, 0), other=-1)
                entry = tl.where(key >= 0, key | (1 << (g + OWNER_SHIFT)), -1)
                tl.store(packed + g * K + offs, entry, mask=offs < K)
            tl.store(counts + list_id, GROUP * K)

    @triton.jit
    def _lower_bound(row, key, K, BLOCK_K: tl.constexpr):
        # Entries of the ascending `row` below `key`; as unsigned numbers, the -1 at its end are above every key.
        key = key.to(tl.uint32, bitcast=True)
        at = tl.zeros([BLOCK_K], tl.int32)
        step = BLOCK_K // 2
        while step > 0:
            probe = at + step - 1
            entry = tl.load(row + probe, mask=probe < K, other=-1).to(tl.uint32, bitcast=True)
            at = tl.where(entry < key, at + step, at)
            step = step // 2
        entry = tl.load(row + at, mask=at < K, other=-1).to(tl.uint32, bitcast=True)
        return tl.where(entry < key, at + 1, at)
