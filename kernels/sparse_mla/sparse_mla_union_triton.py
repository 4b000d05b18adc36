"""Merge the key lists of adjacent queries, so that a latent that several of them select is gathered once.

A group of G queries gets one list: the union of its members' keys in ascending order, each entry
`key | owners << shift` with one bit a member. Lists that are not strictly ascending (-1 anywhere but at the end,
repeated keys) are laid end to end instead, each entry owned by its own query: longer, equally exact.

Legend: as `sparse_mla_triton.py`; K selected keys of a query, GROUP queries a list.
"""

from __future__ import annotations

import torch

from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton

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


def list_constants(heads: int, group: int, rows: int, entries: int) -> dict[str, int]:
    """Constants of a kernel over key lists of `entries`, by name.

    Args:
        heads: H.
        group: GROUP, queries a list; 1: lists are the selection itself.
        rows: heads, or heads of a group of queries, that a program takes.
        entries: of a list at most.
    """
    return {
        "H": heads,
        "GROUP": group,
        "OWNER_SHIFT": owner_shift(group),
        "HEAD_BLOCKS": 1 if group > 1 else triton.cdiv(heads, rows),
        "BLOCK_K": triton.next_power_of_2(entries),
    }


def merge_key_lists(
    indices: torch.Tensor,
    group: int,
    slots: int,
    packed: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merged lists of every `group` adjacent queries.

    Args:
        indices: int32 of shape `[B, S, K]`, -1 where a query has fewer keys, its last dimension contiguous. A key that
            is not below `slots` is taken for -1.
        group: queries a list, 2 to `MAX_GROUP`.
        slots: number of key slots; at most `1 << owner_shift(group)`.
        packed: int32 of shape `[B, ceil(S / group), group * K]` to write to, its last dimension contiguous; made when
            None.
        counts: int32 of shape `[B, ceil(S / group)]` to write to, likewise.

    Returns:
        `packed`: the entries, of which only the leading ones of a list are written, and `counts`: their number.
    """
    if indices.dim() != 3 or indices.dtype != torch.int32:
        got = f"{indices.dtype} of {tuple(indices.shape)}"
        raise ValueError(f"merge_key_lists: indices must be int32 [B, S, K], got {got}")
    B, S, K = indices.shape
    if not 1 < group <= MAX_GROUP or slots > 1 << owner_shift(group):
        raise ValueError(f"cannot pack {group} owners and {slots} slots into 31 bits")
    if group * K >= 1 << 15:
        raise ValueError(f"merged lists are limited to 32767 entries, got {group} queries of {K}")
    lists = triton.cdiv(S, group)
    if packed is None or counts is None:
        packed = torch.empty(B, lists, group * K, dtype=torch.int32, device=indices.device)
        counts = torch.empty(B, lists, dtype=torch.int32, device=indices.device)
    # Per member and entry: the new keys before it, and its place in every other member.
    scratch = torch.empty(B, lists, group, group, K + 1, dtype=torch.int16, device=indices.device)
    block_k = triton.next_power_of_2(K)
    tensors = (indices, packed, counts, scratch)
    sizes = (S, lists, slots, 0)
    strides = (*indices.stride()[:2], *packed.stride()[:2], *counts.stride())
    launcher(_merge_key_lists_kernel, (B * lists,), indices)(
        *tensors,
        *sizes,
        *strides,
        K=K,
        GROUP=group,
        OWNER_SHIFT=owner_shift(group),
        BLOCK_K=block_k,
        num_warps=MERGE_WARPS if block_k >= 32 * MERGE_WARPS else 1,
        maxnreg=MERGE_REGISTERS,
    )
    return packed, counts


if triton is not None:

    @triton.jit(do_not_specialize=["S", "lists", "slots", "packed_stride_b", "counts_stride_b", "counts_stride_l"])
    def _merge_key_lists_kernel(
        indices,
        packed,
        counts,
        scratch,
        S,
        lists,
        slots,
        zero,
        stride_b,
        stride_s,
        packed_stride_b,
        packed_stride_l,
        counts_stride_b,
        counts_stride_l,
        K: tl.constexpr,
        GROUP: tl.constexpr,
        OWNER_SHIFT: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        # A key is new in the first member that lists it, and is placed behind every new key below it, whichever
        # member's: `before` of a member counts its own new keys before each entry, and where a key stands or would
        # stand in another member is found by searching, or is noted there by the later member that found it first.
        list_id = tl.program_id(0).to(tl.int64)
        batch, within = list_id // lists, list_id % lists
        first = within * GROUP
        members = tl.minimum(S - first, GROUP)
        rows = indices + batch * stride_b + first * stride_s
        packed += batch * packed_stride_b + within * packed_stride_l
        counts += batch * counts_stride_b + within * counts_stride_l
        # [GROUP, GROUP, K + 1]: at (g, g) `before` of member g, at (g, h) where g's entries stand or would stand in h;
        # for h > g only of those that h lists too, -1 of others.
        scratch += list_id * GROUP * GROUP * (K + 1)
        # One layout, an entry a thread, for contiguous and gathered accesses alike: `zero` hides the contiguity, for
        # which the compiler would change the layout through shared memory at every access.
        offs = tl.arange(0, BLOCK_K) ^ zero

        ascending = 1
        for g in tl.static_range(GROUP):
            key = tl.load(rows + g * stride_s + offs, mask=offs < tl.where(g < members, K, 0), other=-1)
            after = tl.load(rows + g * stride_s + offs + 1, mask=offs + 1 < tl.where(g < members, K, 0), other=-1)
            wrong = (after >= 0) & ((key < 0) | (after <= key))
            ascending = ascending & (1 - tl.max(wrong.to(tl.int32), 0))
            for h in tl.static_range(g):
                tl.store(scratch + (h * GROUP + g) * (K + 1) + offs, tl.full([BLOCK_K], -1, tl.int16), mask=offs < K)

        if ascending != 0:
            total = 0
            for g in tl.static_range(GROUP):
                tl.debug_barrier()
                key = tl.load(rows + g * stride_s + offs, mask=offs < tl.where(g < members, K, 0), other=-1)
                real = (key >= 0) & (key < slots)
                new = real.to(tl.int32)
                for h in tl.static_range(g):
                    # Rows past the last query have no keys to place: search any row instead of theirs.
                    row = rows + tl.minimum(h, members - 1) * stride_s
                    at = _lower_bound(row, key, real, K, BLOCK_K)
                    found = real & (tl.load(row + at, mask=real & (at < K), other=-1) == key)
                    tl.store(scratch + (g * GROUP + h) * (K + 1) + offs, at.to(tl.int16), mask=offs < K)
                    tl.store(scratch + (h * GROUP + g) * (K + 1) + at, offs.to(tl.int16), mask=found)
                    new = tl.where(found, 0, new)
                running = tl.cumsum(new, 0)
                own = scratch + (g * GROUP + g) * (K + 1)
                tl.store(own + offs, (running - new).to(tl.int16), mask=offs < K)
                added = tl.max(running, 0)
                tl.store(own + K, added.to(tl.int16))
                total += added
            tl.store(counts, total)
            tl.debug_barrier()
            for g in tl.static_range(GROUP):
                key = tl.load(rows + g * stride_s + offs, mask=offs < tl.where(g < members, K, 0), other=-1)
                own = scratch + (g * GROUP + g) * (K + 1)
                place = tl.load(own + offs, mask=offs < K, other=0).to(tl.int32)
                new = (key >= 0) & (tl.load(own + offs + 1, mask=offs < K, other=0).to(tl.int32) > place)
                owners = tl.full([BLOCK_K], 1 << g, tl.int32)
                for h in tl.static_range(GROUP):
                    if h != g:
                        at = tl.load(scratch + (g * GROUP + h) * (K + 1) + offs, mask=new, other=0).to(tl.int32)
                        if h > g:
                            owners += tl.where(at >= 0, 1 << h, 0)
                            row = rows + tl.minimum(h, members - 1) * stride_s
                            at = tl.where(at >= 0, at, _lower_bound(row, key, new & (at < 0), K, BLOCK_K))
                        place += tl.load(scratch + (h * GROUP + h) * (K + 1) + at, mask=new, other=0).to(tl.int32)
                tl.store(packed + place, key | (owners << OWNER_SHIFT), mask=new)
        else:
            for g in tl.static_range(GROUP):
                key = tl.load(rows + g * stride_s + offs, mask=offs < tl.where(g < members, K, 0), other=-1)
                entry = tl.where((key >= 0) & (key < slots), key | (1 << (g + OWNER_SHIFT)), -1)
                tl.store(packed + g * K + offs, entry, mask=offs < K)
            tl.store(counts, GROUP * K)

    @triton.jit
    def _lower_bound(row, key, wanted, K: tl.constexpr, BLOCK_K: tl.constexpr):
        # Entries of the ascending `row` below `key`, where `wanted`; as unsigned numbers, the -1 at its end are above
        # every key.
        key = key.to(tl.uint32, bitcast=True)
        at = tl.zeros([BLOCK_K], tl.int32)
        step = BLOCK_K // 2
        while step > 0:
            probe = at + step - 1
            inside = wanted if K == BLOCK_K else wanted & (probe < K)
            entry = tl.load(row + probe, mask=inside, other=-1).to(tl.uint32, bitcast=True)
            at = tl.where(entry < key, at + step, at)
            step = step // 2
        inside = wanted if K == BLOCK_K else wanted & (at < K)
        entry = tl.load(row + at, mask=inside, other=-1).to(tl.uint32, bitcast=True)
        return tl.where(entry < key, at + 1, at)

    @triton.jit
    def program_place(lists, HEAD_BLOCKS: tl.constexpr):
        """List, block of heads and batch (int64) of this program."""
        list_id = tl.program_id(0) // HEAD_BLOCKS
        head_block = tl.program_id(0) % HEAD_BLOCKS
        batch = (list_id // lists).to(tl.int64)
        return list_id % lists, head_block, batch

    @triton.jit
    def row_of(offs_m, list_id, S, H: tl.constexpr, GROUP: tl.constexpr):
        """Query (int64), head and member of the group of each row, and which rows exist."""
        if GROUP > 1:
            member, head = offs_m // H, offs_m % H
        else:
            member, head = offs_m * 0, offs_m
        query = list_id * GROUP + member
        row_mask = (head < H) & (member < GROUP) & (query < S)
        return query.to(tl.int64), head, member, row_mask

    @triton.jit
    def count_keys(keys_row, K, BLOCK_K: tl.constexpr):
        """Entries of a list up to its last key."""
        offs_all = tl.arange(0, BLOCK_K)
        all_keys = tl.load(keys_row + offs_all, mask=offs_all < K, other=-1)
        return tl.max(tl.where(all_keys >= 0, offs_all + 1, 0), 0)

    @triton.jit
    def slot_of(key, T, GROUP: tl.constexpr, OWNER_SHIFT: tl.constexpr):
        """The slots of entries, and which are one of T keys; merged lists hold no others."""
        listed = key >= 0
        slot = key
        if GROUP > 1:
            slot = key & ((1 << OWNER_SHIFT) - 1)
        else:
            listed = listed & (key < T)
        return slot, listed

else:  # Without Triton the kernels that call these do not exist either; importing their names must work.
    count_keys = program_place = row_of = slot_of = None
