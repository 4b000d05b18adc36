"""The lightning indexer in Triton: scores and exact top-k of a prefill in one kernel, and the choice of the path.

Prefill: a program owns BQ queries (BQ * heads = 256 columns of a matrix product with the keys as rows) and visits
their keys in epochs. An epoch is scored into a buffer that stays in L2 by a loop that does nothing but multiply; then
the scores above each row's bound, a genuine k-th best of that row so far, are appended to the row's list; a list that
could overflow in the next epoch is cut to its `topk` best, which raises the bound. Bounds are never guesses, so any
order of scores is selected exactly, at worst with one cut an epoch. Two programs share an SM: one multiplies while the
other reduces, filters or cuts.

Few queries (decode, short chunks): `lightning_indexer_decode_triton.py`.
"""

from __future__ import annotations

import functools

import torch

from .lightning_indexer_decode_triton import indexer_score_slab, next_power_of_2
from .lightning_indexer_select_triton import append_above, fill_rest, keep_best

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Columns (queries * heads) of a score tile: K is read once for every 256 of them.
TILE_COLUMNS = 256
MAX_TOPK = 4096
EPOCH_KEYS = 2048


def unsupported_reason(
    q: torch.Tensor, k: torch.Tensor, topk: int, scale: float, key_mask: torch.Tensor | None
) -> str | None:
    """Why the Triton path cannot take these arguments; None if it can."""
    if triton is None:
        return "triton is not installed"
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype:
        return f"q and k must both be bfloat16 or float16 (got {q.dtype} and {k.dtype})"
    if not 1 <= q.shape[2] <= 64 or not 16 <= q.shape[3] <= 256:
        return f"1 to 64 heads of width 16 to 256 are supported (got {q.shape[2]} of {q.shape[3]})"
    if topk > MAX_TOPK:
        return f"topk is at most {MAX_TOPK} (got {topk})"
    if key_mask is not None and key_mask.dim() == 3:
        return "a key_mask for each query ([B, S, T]) is not supported, only [B, T]"
    if not scale > 0:
        return f"scale must be positive (got {scale})"
    return None


def lightning_indexer_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    topk: int,
    scale: float,
    query_start: torch.Tensor,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments and result as `lightning_indexer`; `unsupported_reason` must be None."""
    B, S, H, D = q.shape
    T = k.shape[1]
    out = torch.empty(B, S, min(topk, T), dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    q, k, weights = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, weights))
    starts = query_start.to(device=q.device).expand(B).contiguous()
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    config = prefill_config(H, D, _architecture(q.device))
    programs = _multiprocessors(q.device) * config["programs_per_sm"]
    if B * -(-S // config["BQ"]) < programs:
        indexer_score_slab(q, k, weights, topk, scale, starts, mask, out, _multiprocessors(q.device))
    else:
        _prefill(q, k, weights, topk, scale, starts, mask, out, config, programs)
    return out


def prefill_config(H: int, D: int, architecture: int) -> dict:
    """Tile sizes of the prefill kernel for an architecture (80, 86, 89, 90, 100, 120; 0 for others)."""
    heads, width = next_power_of_2(H), max(16, next_power_of_2(D))
    # Shared memory holds the queries' tile and the stages of K; two programs fit an SM up to about 100 KB.
    columns = TILE_COLUMNS if architecture in (90, 100) else TILE_COLUMNS // 2
    columns = max(heads, min(columns, columns * 128 // width))
    BQ = max(1, min(8, columns // heads))
    while BQ * heads < 16:
        BQ *= 2
    return {
        "BQ": BQ,
        "HP": heads,
        "DP": width,
        "BK": 64,
        "STAGES": 2,
        "num_warps": 4,
        "programs_per_sm": 2,
    }


def list_capacity(topk: int) -> int:
    """Entries of a row's list: `topk` and an epoch must fit, with slack so that cuts are rare."""
    return next_power_of_2(max(topk, 512) + EPOCH_KEYS + max(topk, 512) // 2)


def _prefill(q, k, weights, topk, scale, starts, mask, out, config, programs) -> None:
    B, S, H, D = q.shape
    BQ, CAP = config["BQ"], list_capacity(topk)
    buffer = torch.empty(programs, EPOCH_KEYS, BQ, dtype=torch.float32, device=q.device)
    list_scores = torch.empty(programs, BQ, CAP, dtype=torch.float32, device=q.device)
    list_keys = torch.empty(programs, BQ, CAP, dtype=torch.int32, device=q.device)
    lightning_indexer_prefill_kernel[(programs,)](
        q,
        k,
        weights,
        starts,
        mask,
        out,
        buffer,
        list_scores,
        list_keys,
        *q.stride()[:3],
        *k.stride()[:2],
        *weights.stride()[:2],
        B,
        S,
        k.shape[1],
        out.shape[2],
        scale,
        H=H,
        HP=config["HP"],
        D=D,
        DP=config["DP"],
        BQ=BQ,
        BK=config["BK"],
        EPOCH=EPOCH_KEYS,
        CAP=CAP,
        FK=512,
        HAS_MASK=mask is not None,
        STAGES=config["STAGES"],
        num_warps=config["num_warps"],
        num_stages=config["STAGES"],
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _architecture(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


if triton is not None:

    @triton.jit(do_not_specialize=["B", "S", "T", "TOPK"])
    def lightning_indexer_prefill_kernel(
        q,
        k,
        weights,
        starts,
        mask,
        out,
        buffer,
        list_scores,
        list_keys,
        q_stride_b,
        q_stride_s,
        q_stride_h,
        k_stride_b,
        k_stride_t,
        w_stride_b,
        w_stride_s,
        B,
        S,
        T,
        TOPK,
        scale,
        H: tl.constexpr,
        HP: tl.constexpr,
        D: tl.constexpr,
        DP: tl.constexpr,
        BQ: tl.constexpr,
        BK: tl.constexpr,
        EPOCH: tl.constexpr,
        CAP: tl.constexpr,
        FK: tl.constexpr,
        HAS_MASK: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        blocks = tl.cdiv(S, BQ) * B
        buffer += program.to(tl.int64) * EPOCH * BQ
        list_scores += program.to(tl.int64) * BQ * CAP
        list_keys += program.to(tl.int64) * BQ * CAP
        column = tl.arange(0, BQ * HP)
        head = column % HP
        dim = tl.arange(0, DP)
        row = tl.arange(0, BQ)

        # Longest rows first, back and forth, so that programs end together.
        for turn in tl.range(0, tl.cdiv(blocks, programs), num_stages=1):
            block = turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)
            if block < blocks:
                b = (block % B).to(tl.int64)
                first_query = (tl.cdiv(S, BQ) - 1 - block // B) * BQ
                start = tl.load(starts + b).to(tl.int32)
                slot = start + first_query + row  # [BQ]
                slot = tl.where(first_query + row < S, tl.minimum(slot, T - 1), -1)
                end = tl.max(slot) + 1

                query = (first_query + column // HP).to(tl.int64)
                real = (query < S) & (head < H)
                q_rows = q + b * q_stride_b + query * q_stride_s + head * q_stride_h
                q_tile = tl.load(q_rows[:, None] + dim[None, :], mask=real[:, None] & (dim < D)[None, :], other=0.0)
                q_tile = tl.trans(q_tile)  # [DP, BQ * HP]
                w = tl.load(weights + b * w_stride_b + query * w_stride_s + head, mask=real, other=0.0)
                w = w.to(tl.float32) * scale

                bound = tl.full([BQ], float("-inf"), tl.float32)
                count = tl.zeros([BQ], tl.int32)
                for epoch in tl.range(0, end, EPOCH, num_stages=1):
                    epoch_end = tl.minimum(epoch + EPOCH, end)
                    for first in tl.range(epoch, epoch_end, BK, num_stages=STAGES):
                        # Keys past the end are read at the last slot and never seen by the filter.
                        key = first + tl.arange(0, BK)
                        k_tile_start = k + b * k_stride_b + first * k_stride_t.to(tl.int64)
                        k_rows = k_tile_start + tl.minimum(tl.arange(0, BK), T - 1 - first) * k_stride_t
                        if D == DP:
                            k_tile = tl.load(k_rows[:, None] + dim[None, :])  # [BK, DP]
                        else:
                            k_tile = tl.load(k_rows[:, None] + dim[None, :], mask=(dim < D)[None, :], other=0.0)
                        dots = tl.dot(k_tile, q_tile)  # [BK, BQ * HP]
                        terms = tl.maximum(dots, 0.0) * w[None, :]
                        score = tl.sum(tl.reshape(terms, [BK, BQ, HP]), 2)  # [BK, BQ]
                        tl.store(buffer + (key - epoch)[:, None] * BQ + row[None, :], score)
                    tl.debug_barrier()
                    for first in tl.range(epoch, epoch_end, FK, num_stages=1):
                        key = first + tl.arange(0, FK)
                        score = tl.load(buffer + (key - epoch)[:, None] * BQ + row[None, :])  # [FK, BQ]
                        seen = key[:, None] <= slot[None, :]
                        if HAS_MASK:
                            allowed = tl.load(mask + b * T + key, mask=key < T, other=0)
                            seen &= (allowed != 0)[:, None]
                        count = append_above(score, seen, key, bound, count, list_scores, list_keys, CAP, True)
                    tl.debug_barrier()
                    if tl.max(count) > CAP - EPOCH:
                        for i in tl.range(0, BQ, num_stages=1):
                            n = tl.sum(tl.where(row == i, count, 0))
                            if n > TOPK:
                                scores_i, keys_i = list_scores + i * CAP, list_keys + i * CAP
                                kth = keep_best(scores_i, keys_i, n, TOPK, scores_i, keys_i, CAP, 1024, True)
                                bound = tl.where(row == i, kth, bound)
                                count = tl.where(row == i, TOPK, count)
                for i in tl.range(0, BQ, num_stages=1):
                    if first_query + i < S:
                        n = tl.sum(tl.where(row == i, count, 0))
                        out_i = out + (b * S + first_query + i) * TOPK
                        scores_i, keys_i = list_scores + i * CAP, list_keys + i * CAP
                        keep_best(scores_i, keys_i, n, TOPK, scores_i, out_i, CAP, 1024, False)
                        fill_rest(out_i, tl.minimum(n, TOPK), TOPK, 1024)
