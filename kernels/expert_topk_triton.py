"""Routing in Triton: logits of a block of tokens in one matmul, or of one token by reading the weight at full width;
then the k best by k rounds of maximum.

Half-precision products are exact in fp32 and summed there, so logits are what an fp32 matmul gives.
"""

from __future__ import annotations

import torch

from .early_launch import early_launch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Scores of a block of tokens stay in registers.
MAX_EXPERTS = 512
# Up to so many tokens, and experts, each token is a program of its own, which holds so many weights at once.
VECTOR_TOKENS, VECTOR_EXPERTS, VECTOR_TILE = 4, 64, 8192


def expert_topk_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, scaling: float, normalise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.expert_topk.expert_topk`, without groups."""
    tokens, width = x.shape
    experts = weight.shape[0]
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=x.device)
    chosen = torch.empty(tokens, k, dtype=torch.int64, device=x.device)
    if tokens == 0:
        return logits, weights, chosen
    padded = max(16, triton.next_power_of_2(experts))
    if tokens <= VECTOR_TOKENS and padded <= VECTOR_EXPERTS:
        expert_topk_vector_kernel[(tokens,)](
            x if x.stride(1) == 1 else x.contiguous(),
            weight.contiguous(),
            bias,
            logits,
            weights,
            chosen,
            scaling,
            x.stride(0),
            E=experts,
            EP=padded,
            D=width,
            K=k,
            COLUMNS=VECTOR_TILE // padded,
            NORMALISE=normalise,
            num_warps=8,
            **early_launch(),
        )
        return logits, weights, chosen
    few = tokens <= 512
    block = 16 if few or padded > 128 else 64
    x = x if x.stride(1) == 1 else x.contiguous()
    expert_topk_kernel[(triton.cdiv(tokens, block),)](
        x,
        weight.contiguous(),
        bias,
        logits,
        weights,
        chosen,
        scaling,
        tokens,
        x.stride(0),
        E=experts,
        EP=padded,
        D=width,
        K=k,
        BLOCK=block,
        BLOCK_D=128 if few and padded <= 128 else 64,
        NORMALISE=normalise,
        num_warps=4,
        num_stages=4 if padded <= 128 else 2,
    )
    return logits, weights, chosen


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
        tokens,
        x_stride,
        E: tl.constexpr,
        EP: tl.constexpr,
        D: tl.constexpr,
        K: tl.constexpr,
        BLOCK: tl.constexpr,
        BLOCK_D: tl.constexpr,
        NORMALISE: tl.constexpr,
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
        best, best_score = _best(total, bias, E, EP, K, NORMALISE)
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
        scaling,
        x_stride,
        E: tl.constexpr,
        EP: tl.constexpr,
        D: tl.constexpr,
        K: tl.constexpr,
        COLUMNS: tl.constexpr,
        NORMALISE: tl.constexpr,
        EARLY: tl.constexpr = 0,
    ):
        """Logits, weights and experts of one token."""
        token = tl.program_id(0).to(tl.int64)
        expert = tl.arange(0, EP)
        known = expert < E
        column = tl.arange(0, COLUMNS)
        acc = tl.zeros([EP, COLUMNS], tl.float32)
        for first in tl.static_range(0, D, COLUMNS):
            inside = first + column < D
            rows = weight + expert[:, None] * D + first + column[None, :]
            tile = tl.load(rows, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
            if EARLY and first == 0:
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
            value = tl.load(x + token * x_stride + first + column, mask=inside, other=0.0).to(tl.float32)
            acc += tile * value[None, :]
        total = tl.sum(acc, 1)[None, :]  # [1, EP]
        tl.store(logits + token * E + expert[None, :], total, mask=known[None, :])
        best, best_score = _best(total, bias, E, EP, K, NORMALISE)
        slot = tl.arange(0, triton.next_power_of_2(K))
        out = token * K + slot[None, :]
        tl.store(weights + out, best_score * scaling, mask=(slot < K)[None, :])
        tl.store(chosen + out, best.to(tl.int64), mask=(slot < K)[None, :])

    @triton.jit
    def _best(total, bias, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr):
        """The K best experts by logits `total [N, EP]`, and their scores, `[N, K rounded up]` each."""
        expert = tl.arange(0, EP)
        known = (expert < E)[None, :]
        score = tl.sigmoid(total)
        gain = tl.load(bias + expert, mask=expert < E, other=0.0).to(tl.float32)
        choice = tl.where(known, score + gain[None, :], float("-inf"))
        # NaN would match no maximum; an expert must be named all the same.
        choice = tl.where(choice == choice, choice, -1e30)
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
