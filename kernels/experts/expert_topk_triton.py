"""Routing in Triton: logits of a block of tokens in one matmul, or of one token by reading the weight at full width;
then the k best by k rounds of maximum, within the groups whose two best sum highest.

Of a few tokens and many experts the weight is read by many programs, and a second kernel chooses. Half-precision
products are exact in fp32 and summed there, so logits are what an fp32 matmul gives. Of equal experts, and of equal
groups, the first wins, as in `torch.topk` on a GPU.

Legend: E experts, EP as a power of two; D width of a token, K experts a token; G groups, KEPT those chosen from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.early_launch import early_launch, wait_for_kernels_ahead
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton

# Scores of a block of tokens stay in registers.
MAX_EXPERTS = 512
# Up to so many tokens small blocks are needed to fill the GPU; up to so many experts shared memory holds four stages.
FEW_TOKENS, FEW_EXPERTS = 512, 128
# Up to so many tokens, and experts, each token is a program of its own.
VECTOR_TOKENS, VECTOR_EXPERTS = 4, 64
# Weights that it holds at once: all of them, or some of them several times.
WHOLE_TILE, PART_TILE = 32768, 16384
# Of more experts each program makes so many logits, from so many columns at a time.
LOGITS, LOGIT_COLUMNS = 2, 2048


class Grouping(NamedTuple):
    """Groups of experts, those that are chosen from, and what stands in the choice for experts of the others."""

    groups: int = 1
    kept: int = 1
    masked_score: float = float("-inf")

    def constants(self) -> dict[str, int]:
        """Of a kernel that chooses."""
        return {"G": self.groups, "KEPT": self.kept}


WHOLE = Grouping()


def expert_topk_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    scaling: float,
    normalise: bool,
    groups: int | None = None,
    topk_groups: int = 1,
    masked_score: float = float("-inf"),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.expert_topk.expert_topk`, of experts and groups that are powers of two in number if in groups."""
    grouping = WHOLE if groups is None else Grouping(groups, topk_groups, masked_score)
    tokens, width = x.shape
    experts = weight.shape[0]
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=x.device)
    chosen = torch.empty(tokens, k, dtype=torch.int64, device=x.device)
    if tokens == 0:
        return logits, weights, chosen
    x = x if x.stride(1) == 1 else x.contiguous()
    if tokens <= VECTOR_TOKENS:
        _launch_vector(x, weight, bias, logits, weights, chosen, scaling, normalise, grouping, None, 0.0, None)
        return logits, weights, chosen
    padded = max(16, triton.next_power_of_2(experts))
    few = tokens <= FEW_TOKENS
    block = 16 if few or padded > FEW_EXPERTS else 64
    tensors = (x, weight.contiguous(), bias, logits, weights, chosen)
    launcher(expert_topk_kernel, (triton.cdiv(tokens, block),), x)(
        *tensors,
        scaling,
        grouping.masked_score,
        tokens,
        x.stride(0),
        E=experts,
        EP=padded,
        D=width,
        K=k,
        BLOCK=block,
        BLOCK_D=128 if few and padded <= FEW_EXPERTS else 64,
        NORMALISE=normalise,
        **grouping.constants(),
        num_warps=4,
        num_stages=4 if padded <= FEW_EXPERTS else 2,
    )
    return logits, weights, chosen


def normed_expert_topk_triton(
    x, norm, eps, weight, bias, k, scaling, normalise, groups=None, topk_groups=1, masked_score=float("-inf")
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.expert_topk.normed_expert_topk`, for at most `VECTOR_TOKENS`."""
    grouping = WHOLE if groups is None else Grouping(groups, topk_groups, masked_score)
    tokens, device = x.shape[0], x.device
    normed = torch.empty(x.shape, dtype=x.dtype, device=device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=device)
    chosen = torch.empty(tokens, k, dtype=torch.int64, device=device)
    if tokens:
        x = x if x.stride(1) == 1 else x.contiguous()
        _launch_vector(x, weight, bias, None, weights, chosen, scaling, normalise, grouping, norm, eps, normed)
    return normed, weights, chosen


def _launch_vector(x, weight, bias, logits, weights, chosen, scaling, normalise, grouping, norm, eps, normed) -> None:
    """One program a token; of many experts several make its logits, and one chooses."""
    tokens, width = x.shape
    experts, padded = weight.shape[0], max(16, triton.next_power_of_2(weight.shape[0]))
    k = weights.shape[1]
    # A copy of the weight would be younger than what an early kernel may read before it waits.
    early = early_launch() if weight.is_contiguous() else {}
    weight = weight.contiguous()
    rows = (x if norm is None else norm, x if normed is None else normed)
    if experts > VECTOR_EXPERTS:
        if logits is None:
            logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
        launcher(expert_logits_kernel, (tokens, triton.cdiv(experts, LOGITS)), x)(
            x,
            weight,
            logits,
            *rows,
            eps,
            x.stride(0),
            E=experts,
            D=width,
            LOGITS=LOGITS,
            COLUMNS=min(LOGIT_COLUMNS, max(256, triton.next_power_of_2(width))),
            HAS_NORM=norm is not None,
            num_warps=8,
            **early,
        )
        launcher(choose_experts_kernel, (tokens,), x)(
            logits,
            bias,
            weights,
            chosen,
            scaling,
            grouping.masked_score,
            E=experts,
            EP=padded,
            K=k,
            NORMALISE=normalise,
            **grouping.constants(),
            num_warps=4,
            **early_launch(),
        )
        return
    columns = triton.next_power_of_2(width)
    if padded * columns > WHOLE_TILE:
        columns = PART_TILE // padded
    launcher(expert_topk_vector_kernel, (tokens,), x)(
        x,
        weight,
        bias,
        weights if logits is None else logits,
        weights,
        chosen,
        *rows,
        scaling,
        grouping.masked_score,
        eps,
        x.stride(0),
        E=experts,
        EP=padded,
        D=width,
        K=k,
        COLUMNS=columns,
        NORMALISE=normalise,
        HAS_NORM=norm is not None,
        HAS_LOGITS=logits is not None,
        **grouping.constants(),
        num_warps=16,
        **early,
    )


if triton is not None:

    @triton.jit(do_not_specialize=["tokens"])
    def expert_topk_kernel(
        x,
        weight,
        bias,
        logits,
        weights,
        chosen,
        scaling,
        masked_score,
        tokens,
        x_stride,
        E: tl.constexpr,
        EP: tl.constexpr,
        D: tl.constexpr,
        K: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
        NORMALISE: tl.constexpr,
        G: tl.constexpr,
        KEPT: tl.constexpr,
    ):
        """Logits, weights and experts of BLOCK tokens."""
        token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        expert = tl.arange(0, EP)
        real = (token < tokens)[:, None]
        known = (expert < E)[None, :]
        total = tl.zeros([BLOCK, EP], tl.float32)
        for first in range(0, D, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            inside = column < D
            x_tile = tl.load(x + token[:, None] * x_stride + column[None, :], mask=real & inside[None, :], other=0.0)
            w_ptr = weight + expert[None, :] * D + column[:, None]
            w_tile = tl.load(w_ptr, mask=known & inside[:, None], other=0.0)  # [BLOCK_D, EP]
            total = tl.dot(x_tile, w_tile, acc=total)
        tl.store(logits + token[:, None] * E + expert[None, :], total, mask=real & known)
        best, best_score = _best(total, bias, masked_score, E, EP, K, G, KEPT, NORMALISE)
        slot = tl.arange(0, triton.next_power_of_2(K))
        out = token[:, None] * K + slot[None, :]
        inside = real & (slot < K)[None, :]
        tl.store(weights + out, best_score * scaling, mask=inside)
        tl.store(chosen + out, best.to(tl.int64), mask=inside)

    @triton.jit
    def expert_topk_vector_kernel(
        x,
        weight,
        bias,
        logits,
        weights,
        chosen,
        norm,
        normed,
        scaling,
        masked_score,
        eps,
        x_stride,
        E: tl.constexpr,
        EP: tl.constexpr,
        D: tl.constexpr,
        K: tl.constexpr,
        COLUMNS: tl.constexpr,
        NORMALISE: tl.constexpr,
        HAS_NORM: tl.constexpr,
        HAS_LOGITS: tl.constexpr,
        G: tl.constexpr,
        KEPT: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """Logits, weights and experts of one token."""
        token = tl.program_id(0).to(tl.int64)
        expert = tl.arange(0, EP)
        known = expert < E
        column = tl.arange(0, COLUMNS)
        rows = weight + expert[:, None] * D + column[None, :]
        tile = tl.load(rows, mask=known[:, None] & (column < D)[None, :], other=0.0)
        wait_for_kernels_ahead(EARLY)
        x += token * x_stride
        factor = 1.0
        if HAS_NORM:
            squares = tl.zeros([COLUMNS], tl.float32)
            for first in tl.static_range(0, D, COLUMNS):
                value = tl.load(x + first + column, mask=first + column < D, other=0.0).to(tl.float32)
                squares += value * value
            factor = tl.rsqrt(tl.sum(squares, 0) / D + eps)
        acc = tl.zeros([EP, COLUMNS], tl.float32)
        for first in tl.static_range(0, D, COLUMNS):
            inside = first + column < D
            if first > 0:
                tile = tl.load(rows + first, mask=known[:, None] & inside[None, :], other=0.0)
            value = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                # Rounded where a norm of its own would.
                dtype = normed.dtype.element_ty
                gain = tl.load(norm + first + column, mask=inside, other=0.0).to(tl.float32)
                row = ((value * factor).to(dtype).to(tl.float32) * gain).to(dtype)
                tl.store(normed + token * D + first + column, row, mask=inside)
                value = row.to(tl.float32)
            acc += tile.to(tl.float32) * value[None, :]
        total = tl.sum(acc, 1)[None, :]  # [1, EP]
        if HAS_LOGITS:
            tl.store(logits + token * E + expert[None, :], total, mask=known[None, :])
        best, best_score = _best(total, bias, masked_score, E, EP, K, G, KEPT, NORMALISE)
        slot = tl.arange(0, triton.next_power_of_2(K))
        out = token * K + slot[None, :]
        tl.store(weights + out, best_score * scaling, mask=(slot < K)[None, :])
        tl.store(chosen + out, best.to(tl.int64), mask=(slot < K)[None, :])

    @triton.jit
    def expert_logits_kernel(
        x,
        weight,
        logits,
        norm,
        normed,
        eps,
        x_stride,
        E: tl.constexpr,
        D: tl.constexpr,
        LOGITS: tl.constexpr,
        COLUMNS: tl.constexpr,
        HAS_NORM: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """LOGITS experts' logits of one token; the first experts' program keeps the normed row."""
        token = tl.program_id(0).to(tl.int64)
        expert = tl.program_id(1) * LOGITS + tl.arange(0, LOGITS)
        known = (expert < E)[:, None]
        column = tl.arange(0, COLUMNS)
        rows = weight + expert[:, None] * D + column[None, :]
        tile = tl.load(rows, mask=known & (column < D)[None, :], other=0.0)
        wait_for_kernels_ahead(EARLY)
        x += token * x_stride
        factor = 1.0
        if HAS_NORM:
            squares = tl.zeros([COLUMNS], tl.float32)
            for first in tl.static_range(0, D, COLUMNS):
                value = tl.load(x + first + column, mask=first + column < D, other=0.0).to(tl.float32)
                squares += value * value
            factor = tl.rsqrt(tl.sum(squares, 0) / D + eps)
        acc = tl.zeros([LOGITS, COLUMNS], tl.float32)
        for first in tl.static_range(0, D, COLUMNS):
            inside = first + column < D
            if first > 0:
                tile = tl.load(rows + first, mask=known & inside[None, :], other=0.0)
            value = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                # Rounded where a norm of its own would.
                dtype = normed.dtype.element_ty
                gain = tl.load(norm + first + column, mask=inside, other=0.0).to(tl.float32)
                row = ((value * factor).to(dtype).to(tl.float32) * gain).to(dtype)
                if tl.program_id(1) == 0:
                    tl.store(normed + token * D + first + column, row, mask=inside)
                value = row.to(tl.float32)
            acc += tile.to(tl.float32) * value[None, :]
        tl.store(logits + token * E + expert, tl.sum(acc, 1), mask=expert < E)

    @triton.jit
    def choose_experts_kernel(
        logits,
        bias,
        weights,
        chosen,
        scaling,
        masked_score,
        E: tl.constexpr,
        EP: tl.constexpr,
        K: tl.constexpr,
        NORMALISE: tl.constexpr,
        G: tl.constexpr,
        KEPT: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """Weights and experts of one token by its logits."""
        token = tl.program_id(0).to(tl.int64)
        wait_for_kernels_ahead(EARLY)
        expert = tl.arange(0, EP)
        total = tl.load(logits + token * E + expert, mask=expert < E, other=0.0)[None, :]
        best, best_score = _best(total, bias, masked_score, E, EP, K, G, KEPT, NORMALISE)
        slot = tl.arange(0, triton.next_power_of_2(K))
        out = token * K + slot[None, :]
        tl.store(weights + out, best_score * scaling, mask=(slot < K)[None, :])
        tl.store(chosen + out, best.to(tl.int64), mask=(slot < K)[None, :])

    @triton.jit
    def _within_groups(choice, masked_score, EP: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr):
        """`choice [N, EP]` with `masked_score` for all but the KEPT of G groups whose two best sum highest."""
        SIZE: tl.constexpr = EP // G
        N: tl.constexpr = choice.shape[0]
        by_group = tl.reshape(choice, [N, G, SIZE])
        sums = tl.max(by_group, 2)  # [N, G]
        if SIZE > 1:
            place = tl.arange(0, SIZE)[None, None, :]
            first = tl.min(tl.where(by_group == sums[:, :, None], place, SIZE), 2)
            sums += tl.max(tl.where(place == first[:, :, None], float("-inf"), by_group), 2)
        group = tl.arange(0, G)[None, :]
        kept = tl.zeros([N, G], tl.int32)
        for _ in tl.static_range(KEPT):
            left = tl.where(kept > 0, float("-inf"), sums)
            top = tl.max(left, 1)
            winner = tl.min(tl.where((left == top[:, None]) & (kept == 0), group, G), 1)
            kept = tl.where(group == winner[:, None], 1, kept)
        return tl.reshape(tl.where(kept[:, :, None] > 0, by_group, masked_score), [N, EP])

    @triton.jit
    def _best(
        total,
        bias,
        masked_score,
        E: tl.constexpr,
        EP: tl.constexpr,
        K: tl.constexpr,
        G: tl.constexpr,
        KEPT: tl.constexpr,
        NORMALISE: tl.constexpr,
    ):
        """The K best experts by logits `total [N, EP]`, and their scores, `[N, K rounded up]` each."""
        expert = tl.arange(0, EP)
        known = (expert < E)[None, :]
        score = tl.sigmoid(total)
        gain = tl.load(bias + expert, mask=expert < E, other=0.0).to(tl.float32)
        choice = tl.where(known, score + gain[None, :], float("-inf"))
        # NaN would match no maximum; an expert must be named all the same.
        choice = tl.where(choice == choice, choice, -1e30)
        if G > 1:
            choice = _within_groups(choice, masked_score, EP, G, KEPT)
        slot = tl.arange(0, triton.next_power_of_2(K))
        best = tl.zeros([total.shape[0], triton.next_power_of_2(K)], tl.int32)
        best_score = tl.zeros([total.shape[0], triton.next_power_of_2(K)], tl.float32)
        for i in tl.static_range(K):
            top = tl.max(choice, 1)
            winner = tl.min(tl.where(choice == top[:, None], expert[None, :], EP), 1)  # [BLOCK]
            is_winner = expert[None, :] == winner[:, None]
            its_score = tl.sum(tl.where(is_winner, score, 0.0), 1)
            best = tl.where(slot[None, :] == i, winner[:, None], best)
            best_score = tl.where(slot[None, :] == i, its_score[:, None], best_score)
            choice = tl.where(is_winner, float("-inf"), choice)
        if NORMALISE:
            best_score = best_score / (tl.sum(best_score, 1)[:, None] + 1e-20)
        return best, best_score
