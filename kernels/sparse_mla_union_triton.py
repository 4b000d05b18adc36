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


def owner_shift(group: int) -> int:
    """Position of the first ownership bit in a packed int32 entry; the sign bit stays free for -1."""
    return 31 - group


def group_size(heads: int, rows: int, slots: int) -> int:
    """Adjacent queries whose heads fill `rows`; 1 where `slots` leaves no room for ownership bits."""
    group = min(MAX_GROUP, rows // heads) if heads <= rows else 1
    return group if slots <= 1 << owner_shift(group) else 1


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
    lists = triton.cdiv(S, group)
    packed = torch.empty(B, lists, group * K, dtype=torch.int32, device=indices.device)
    counts = torch.empty(B, lists, dtype=torch.int32, device=indices.device)
    # Exclusive prefix counts of the keys that each member adds to the union, with the total at the end.
    added = torch.empty(B, lists, group, K + 1, dtype=torch.int16, device=indices.device)
    block_k = triton.next_power_of_2(K)
    _merge_key_lists_kernel[(B * lists,)](
        indices,
        packed,
        counts,
        added,
        S,
        K,
        lists,
        *indices.stride()[:2],
        GROUP=group,
        OWNER_SHIFT=owner_shift(group),
        BLOCK_K=block_k,
        num_warps=min(8, max(1, block_k // 128)),
    )
    return packed, counts


if triton is not None:

    @triton.jit
    def _merge_key_lists_kernel(
        indices,
        packed,
        counts,
        added,
        S,
        K,
        lists,
        stride_b,
        stride_s,
        GROUP: tl.constexpr,
        OWNER_SHIFT: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        list_id = tl.program_id(0).to(tl.int64)
        first = (list_id % lists) * GROUP
        rows = indices + (list_id // lists) * stride_b + first * stride_s
        packed += list_id * GROUP * K
        added += list_id * GROUP * (K + 1)
        offs = tl.arange(0, BLOCK_K)

        ascending = 1
        for g in tl.static_range(GROUP):
            length = tl.where(first + g < S, K, 0)  # queries past the end have no keys
            key = tl.load(rows + g * stride_s + offs, mask=offs < length, other=-1)
            after = tl.load(rows + g * stride_s + offs + 1, mask=offs + 1 < length, other=-1)
            wrong = (after >= 0) & ((key < 0) | (after <= key))
            ascending = ascending & (1 - tl.max(wrong.to(tl.int32), 0))

        if ascending != 0:
            total = 0
            for g in tl.static_range(GROUP):
                length = tl.where(first + g < S, K, 0)
                key = tl.load(rows + g * stride_s + offs, mask=offs < length, other=-1)
                new = (key >= 0).to(tl.int32)
                for h in tl.static_range(g):
                    _, found = _lower_bound(rows + h * stride_s, key, tl.where(first + h < S, K, 0), BLOCK_K)
                    new = new & (1 - found)
                running = tl.cumsum(new, 0)
                tl.store(added + g * (K + 1) + offs, (running - new).to(tl.int16), mask=offs < K)
                members = tl.max(running, 0)
                tl.store(added + g * (K + 1) + K, members.to(tl.int16))
                total += members
            tl.store(counts + list_id, total)
            tl.debug_barrier()
            for g in tl.static_range(GROUP):
                length = tl.where(first + g < S, K, 0)
                key = tl.load(rows + g * stride_s + offs, mask=offs < length, other=-1)
                place = tl.load(added + g * (K + 1) + offs, mask=offs < length, other=0).to(tl.int32)
                new = tl.load(added + g * (K + 1) + offs + 1, mask=offs < length, other=0).to(tl.int32) > place
                owners = tl.full([BLOCK_K], 1 << g, tl.int32)
                for h in tl.static_range(GROUP):
                    if h != g:
                        at, found = _lower_bound(rows + h * stride_s, key, tl.where(first + h < S, K, 0), BLOCK_K)
                        owners += found << h
                        place += tl.load(added + h * (K + 1) + at, mask=new, other=0).to(tl.int32)
                tl.store(packed + place, key | (owners << OWNER_SHIFT), mask=new)
        else:
            for g in tl.static_range(GROUP):
                length = tl.where(first + g < S, K, 0)
                key = tl.load(rows + g * stride_s + offs, mask=offs < length, other=-1)
                entry = tl.where(key >= 0, key | (1 << (g + OWNER_SHIFT)), -1)
                tl.store(packed + g * K + offs, entry, mask=offs < K)
            tl.store(counts + list_id, GROUP * K)

    @triton.jit
    def _lower_bound(row, key, length, BLOCK_K: tl.constexpr):
        # Entries of the ascending `row` below `key` (-1 at its end counts as infinity), and whether `key` is in it.
        at = tl.zeros([BLOCK_K], tl.int32)
        step = BLOCK_K
        while step > 0:
            probe = at + step - 1
            entry = tl.load(row + probe, mask=(probe < length) & (key >= 0), other=-1)
            at = tl.where((entry >= 0) & (entry < key), at + step, at)
            step = step // 2
        found = tl.load(row + at, mask=(at < length) & (key >= 0), other=-1) == key
        return at, (found & (key >= 0)).to(tl.int32)
