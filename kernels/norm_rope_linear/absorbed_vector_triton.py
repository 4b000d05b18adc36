"""Absorbed queries and expanded values in Triton: one program makes a few outputs of one head of one token.

Legend: H heads, N width of a query without RoPE, R RoPE width, C latent width, V value width.
"""

from __future__ import annotations

import torch

from ..common.early_launch import early_launch, wait_for_kernels_ahead
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton

# Latent entries, and value entries, of a program.
LATENT_ENTRIES, VALUE_ENTRIES = 32, 16


def absorb_queries_triton(
    q: torch.Tensor, to_latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """As `kernels.absorbed_vector.absorb_queries`, for one dtype."""
    batch, queries, heads, width = q.shape
    nope, rank = to_latent.shape[1:]
    rope = width - nope
    q, cos, sin = q.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty(batch, queries, heads, rank + rope, dtype=q.dtype, device=q.device)
    tensors = (q, to_latent, cos, sin, out)
    launcher(absorb_queries_kernel, (batch * queries * heads, triton.cdiv(rank, LATENT_ENTRIES) + 1), q)(
        *tensors,
        queries,
        *to_latent.stride()[:2],
        0 if cos.shape[0] == 1 else cos.stride(0),
        H=heads,
        N=nope,
        BLOCK_N=triton.next_power_of_2(nope),
        R=rope,
        BLOCK_R=max(1, triton.next_power_of_2(rope // 2)),
        C=rank,
        ENTRIES=LATENT_ENTRIES,
        INTERLEAVED=interleaved,
        num_warps=4,
        **early_launch(),
    )
    return out


def expand_values_triton(latent_out: torch.Tensor, to_value: torch.Tensor) -> torch.Tensor:
    """As `kernels.absorbed_vector.expand_values`, for one dtype."""
    batch, queries, heads, rank = latent_out.shape
    value = to_value.shape[1]
    latent_out = latent_out.contiguous()
    out = torch.empty(batch, queries, heads, value, dtype=latent_out.dtype, device=latent_out.device)
    launcher(expand_values_kernel, (batch * queries * heads, triton.cdiv(value, VALUE_ENTRIES)), latent_out)(
        latent_out,
        to_value,
        out,
        *to_value.stride()[:2],
        H=heads,
        V=value,
        C=rank,
        BLOCK_C=triton.next_power_of_2(rank),
        ENTRIES=VALUE_ENTRIES,
        num_warps=4,
        **early_launch(),
    )
    return out


if triton is not None:

    @triton.jit(do_not_specialize=["queries"])
    def absorb_queries_kernel(
        q,
        to_latent,
        cos,
        sin,
        out,
        queries,
        weight_stride_h,
        weight_stride_n,
        angle_stride_b,
        H: tl.constexpr,
        N: tl.constexpr,
        BLOCK_N: tl.constexpr,
        R: tl.constexpr,
        BLOCK_R: tl.constexpr,
        C: tl.constexpr,
        ENTRIES: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """ENTRIES latent entries of one head; the program behind the last of them rotates the head's RoPE part."""
        pair = tl.program_id(0).to(tl.int64)
        head, token = pair % H, pair // H
        q += pair * (N + R)
        out += pair * (C + R)
        dtype = out.dtype.element_ty
        first = tl.program_id(1) * ENTRIES
        if first < C:
            row = tl.arange(0, BLOCK_N)
            column = first + tl.arange(0, ENTRIES)
            inside = (row < N)[:, None] & (column < C)[None, :]
            weight = tl.load(
                to_latent + head * weight_stride_h + row[:, None] * weight_stride_n + column[None, :],
                mask=inside,
                other=0.0,
            )
            wait_for_kernels_ahead(EARLY)
            value = tl.load(q + row, mask=row < N, other=0.0).to(tl.float32)
            total = tl.sum(weight.to(tl.float32) * value[:, None], 0)  # [ENTRIES]
            tl.store(out + column, total.to(dtype), mask=column < C)
        else:
            wait_for_kernels_ahead(EARLY)
            half = tl.arange(0, BLOCK_R)
            real = half < R // 2
            if INTERLEAVED:
                low, high = N + 2 * half, N + 2 * half + 1
            else:
                low, high = N + half, N + R // 2 + half
            x = tl.load(q + low, mask=real, other=0.0).to(tl.float32)
            y = tl.load(q + high, mask=real, other=0.0).to(tl.float32)
            angle = token // queries * angle_stride_b + token % queries * R + half
            c = tl.load(cos + angle, mask=real, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=real, other=0.0).to(tl.float32)
            tl.store(out + C + half, (x * c - y * s).to(dtype), mask=real)
            tl.store(out + C + R // 2 + half, (y * c + x * s).to(dtype), mask=real)

    @triton.jit
    def expand_values_kernel(
        latent_out,
        to_value,
        out,
        weight_stride_h,
        weight_stride_v,
        H: tl.constexpr,
        V: tl.constexpr,
        C: tl.constexpr,
        BLOCK_C: tl.constexpr,
        ENTRIES: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """ENTRIES value entries of one head."""
        pair = tl.program_id(0).to(tl.int64)
        head = pair % H
        row = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
        column = tl.arange(0, BLOCK_C)
        weight = tl.load(
            to_value + head * weight_stride_h + row[:, None] * weight_stride_v + column[None, :],
            mask=(row < V)[:, None] & (column < C)[None, :],
            other=0.0,
        )
        wait_for_kernels_ahead(EARLY)
        value = tl.load(latent_out + pair * C + column, mask=column < C, other=0.0).to(tl.float32)
        total = tl.sum(weight.to(tl.float32) * value[None, :], 1)
        tl.store(out + pair * V + row, total.to(out.dtype.element_ty), mask=row < V)
