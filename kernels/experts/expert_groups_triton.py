"""(Token, expert) pairs sorted by expert: a counting sort in three launches.

Programs count their pairs by expert, one adds up what stands before each of them, and each then knows its pairs'
places. Sorting, searching and inverting in PyTorch gives the same in some thirty launches.

Legend: P pairs of a block of tokens, E experts.
"""

from __future__ import annotations

import torch

from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton

# Pairs of a program, and entries of pairs by experts that it holds at once.
PAIRS, TILE = 512, 8192


def group_by_expert_triton(experts: torch.Tensor, count: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.routed_experts.group_by_expert`."""
    tokens, k = experts.shape
    experts = experts.contiguous()
    device, pairs, block_pairs = experts.device, tokens * k, min(block, max(1, tokens)) * k
    blocks, parts = triton.cdiv(tokens, block), triton.cdiv(block_pairs, PAIRS)
    place = torch.empty(tokens, k, dtype=torch.int64, device=device)
    ends = torch.empty(blocks, count, dtype=torch.int32, device=device)
    if pairs == 0:
        return place, ends
    counts = torch.empty(blocks, parts, count, dtype=torch.int32, device=device)
    padded = max(16, triton.next_power_of_2(count))
    rows = max(16, TILE // padded)
    sizes = dict(E=count, EP=padded, PAIRS=PAIRS, ROWS=rows, num_warps=4)
    launcher(count_experts_kernel, (parts, blocks), experts)(experts, counts, pairs, block_pairs, parts, **sizes)
    launcher(start_experts_kernel, (blocks,), counts)(counts, ends, parts, E=count, EP=padded, ROWS=rows, num_warps=4)
    launcher(place_pairs_kernel, (parts, blocks), experts)(experts, counts, place, pairs, block_pairs, parts, **sizes)
    return place, ends


if triton is not None:

    @triton.jit
    def _is_expert(experts, entry, block, pairs, block_pairs, expert):
        """Whether the entries of a block chose each expert, int32 `[ROWS, EP]`, which are real, and their pairs."""
        pair = block * block_pairs + entry
        real = (entry < block_pairs) & (pair < pairs)
        chosen = tl.load(experts + pair, mask=real, other=-1).to(tl.int32)
        return (chosen[:, None] == expert[None, :]).to(tl.int32), real, pair

    @triton.jit(do_not_specialize=["pairs", "block_pairs", "parts"])
    def count_experts_kernel(
        experts,
        counts,
        pairs,
        block_pairs,
        parts,
        E: tl.constexpr,
        EP: tl.constexpr,
        PAIRS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """How many of PAIRS pairs chose each expert."""
        part, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
        expert = tl.arange(0, EP)
        total = tl.zeros([EP], tl.int32)
        for first in range(0, PAIRS, ROWS):
            entry = part * PAIRS + first + tl.arange(0, ROWS)
            chosen, _, _ = _is_expert(experts, entry, block, pairs, block_pairs, expert)
            total += tl.sum(chosen, 0)
        tl.store(counts + (block * parts + part) * E + expert, total, mask=expert < E)

    @triton.jit(do_not_specialize=["parts"])
    def start_experts_kernel(counts, ends, parts, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr):
        """Change counts into the place of each part's first pair of each expert; where each expert's pairs end."""
        block = tl.program_id(0).to(tl.int64)
        expert = tl.arange(0, EP)
        counts += block * parts * E
        total = tl.zeros([EP], tl.int32)
        for first in range(0, parts, ROWS):
            part = first + tl.arange(0, ROWS)
            inside = (part < parts)[:, None] & (expert < E)[None, :]
            total += tl.sum(tl.load(counts + part[:, None] * E + expert[None, :], mask=inside, other=0), 0)
        end = tl.cumsum(total, 0)
        tl.store(ends + block * E + expert, end, mask=expert < E)
        start = end - total
        for first in range(0, parts, ROWS):
            part = first + tl.arange(0, ROWS)
            inside = (part < parts)[:, None] & (expert < E)[None, :]
            here = counts + part[:, None] * E + expert[None, :]
            found = tl.load(here, mask=inside, other=0)
            tl.store(here, tl.cumsum(found, 0) - found + start[None, :], mask=inside)
            start += tl.sum(found, 0)

    @triton.jit(do_not_specialize=["pairs", "block_pairs", "parts"])
    def place_pairs_kernel(
        experts,
        starts,
        place,
        pairs,
        block_pairs,
        parts,
        E: tl.constexpr,
        EP: tl.constexpr,
        PAIRS: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Each pair's place in its block."""
        part, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
        expert = tl.arange(0, EP)
        start = tl.load(starts + (block * parts + part) * E + expert, mask=expert < E, other=0)
        for first in range(0, PAIRS, ROWS):
            entry = part * PAIRS + first + tl.arange(0, ROWS)
            chosen, real, pair = _is_expert(experts, entry, block, pairs, block_pairs, expert)
            rank = tl.cumsum(chosen, 0) - 1 + start[None, :]
            found = tl.sum(chosen * rank, 1)
            tl.store(place + pair, found.to(tl.int64), mask=real)
            start += tl.sum(chosen, 0)
