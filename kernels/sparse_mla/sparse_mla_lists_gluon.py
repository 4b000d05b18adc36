"""What the Hopper kernels of sparse MLA, forward and backward, know of key lists and of their rows.

An entry of a list is a slot, or in merged lists (`sparse_mla_union_triton.py`) a slot with a bit for every query of
the group that selected it, from OWNER_SHIFT on; -1 is no key.

Legend: as `sparse_mla_hopper_gluon.py`; `form` a `ListForm`.
"""

from __future__ import annotations

from typing import NamedTuple

from ..common.gluon_support import gl, gluon


class ListForm(NamedTuple):
    """Constants of a kernel over key lists, which it makes of its own (`list_constants`)."""

    H: int
    GROUP: int
    OWNER_SHIFT: int
    BLOCK_K: int


if gluon is not None:

    @gluon.jit
    def program_place(lists, HEAD_BLOCKS: gl.constexpr):
        """List, block of heads and batch (int64) of this program.

        Head blocks of one query are neighbours: the second gather finds the latents in L2.
        """
        list_id = gl.program_id(0) // HEAD_BLOCKS
        head_block = gl.program_id(0) % HEAD_BLOCKS
        batch = (list_id // lists).to(gl.int64)
        return list_id % lists, head_block, batch

    @gluon.jit
    def count_listed(keys, counts, batch, list_id, lists, K, form: gl.constexpr, WARPS: gl.constexpr):
        """Entries of a list up to its last key."""
        if form.GROUP > 1:
            count = gl.load(counts + batch * lists + list_id)
        else:
            offs_all = gl.arange(0, form.BLOCK_K, layout=gl.BlockedLayout([4], [32], [WARPS], [0]))
            all_keys = gl.load(keys + offs_all, mask=offs_all < K, other=-1)
            count = gl.max(gl.where(all_keys >= 0, offs_all + 1, 0), 0)
        return count

    @gluon.jit
    def is_listed(key, T, form: gl.constexpr):
        """Which entries are one of T keys; merged lists hold no others."""
        listed = key >= 0
        if form.GROUP == 1:
            listed = listed & (key < T)
        return listed

    @gluon.jit
    def is_visible(key, T, member, form: gl.constexpr):
        """Which of the keys [N] each row [M], of the group's `member`, attends to."""
        visible = is_listed(key, T, form)[None, :]
        if form.GROUP > 1:
            owned = (key[None, :] >> (form.OWNER_SHIFT + member)[:, None]) & 1
            visible = visible & (owned != 0)
        return visible

    @gluon.jit
    def slot_of(key, form: gl.constexpr):
        """The slot of an entry, without its owners."""
        slot = key
        if form.GROUP > 1:
            slot = key & ((1 << form.OWNER_SHIFT) - 1)
        return slot

    @gluon.jit
    def row_of(rows, list_id, S, form: gl.constexpr):
        """Query and head of each row, and which rows exist."""
        if form.GROUP > 1:
            query, head = list_id * form.GROUP + rows // form.H, rows % form.H
            mask = (rows < form.GROUP * form.H) & (query < S)
        else:
            query, head = list_id + rows * 0, rows
            mask = rows < form.H
        return query, head, mask

    @gluon.jit
    def opaque_zero(varying):
        """Zero that the compiler does not see through, anew whenever `varying` changes."""
        # Keeps the compiler from hoisting the wgmma descriptors out of the loop: 64-bit each, they would be spilled.
        return gl.inline_asm_elementwise("mov.b32 $0, 0; // $1", "=r,r", [varying], gl.int32, is_pure=False, pack=1)

else:  # Without Gluon the kernels that call these do not exist either; importing their names must work.
    count_listed = is_listed = is_visible = opaque_zero = program_place = row_of = slot_of = None
