"""Rotary position embedding in Triton: one program rotates the rows of a few (token, head) pairs.

Legend: H heads, R rotated entries.
"""

from __future__ import annotations

import torch

from ..common.early_launch import early_launch, wait_for_kernels_ahead
from ..common.kernel_launch import launcher
from ..common.triton_support import tl, triton

# (token, head) pairs of a program.
PAIRS = 64


def rotate_into_triton(
    out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> None:
    """As `kernels.rotary.rotate_into`; the last dimensions of all tensors must be contiguous powers of two."""
    batch, tokens, heads, width = x.shape
    if x.numel() == 0:
        return
    cos, sin = cos.contiguous(), sin.contiguous()
    tensors = (x, out, cos, sin)
    strides = (*x.stride(), *out.stride(), 0 if cos.shape[0] == 1 else cos.stride(0))
    launcher(rotate_kernel, (triton.cdiv(tokens * heads, PAIRS), batch), x)(
        *tensors,
        tokens,
        *strides,
        H=heads,
        R=width,
        PAIRS=PAIRS,
        INTERLEAVED=interleaved,
        num_warps=4,
        **early_launch(),
    )


if triton is not None:

    @triton.jit(do_not_specialize=["tokens"])
    def rotate_kernel(
        x,
        out,
        cos,
        sin,
        tokens,
        x_stride_b,
        x_stride_s,
        x_stride_h,
        x_stride_r,
        out_stride_b,
        out_stride_s,
        out_stride_h,
        out_stride_r,
        angle_stride_b,
        H: tl.constexpr,
        R: tl.constexpr,
        PAIRS: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        EARLY: tl.constexpr = False,
    ):
        """The R entries of PAIRS (token, head) pairs rotated."""
        wait_for_kernels_ahead(EARLY)
        batch = tl.program_id(1).to(tl.int64)
        pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
        token, head = pair // H, pair % H
        real = (token < tokens)[:, None]
        half = tl.arange(0, R // 2)
        rows = x + batch * x_stride_b + token * x_stride_s + head * x_stride_h  # [PAIRS]
        if INTERLEAVED:
            both = tl.load(rows[:, None] + tl.arange(0, R)[None, :] * x_stride_r, mask=real, other=0.0)
            first, second = tl.split(tl.reshape(both, [PAIRS, R // 2, 2]))
        else:
            first = tl.load(rows[:, None] + half[None, :] * x_stride_r, mask=real, other=0.0)
            second = tl.load(rows[:, None] + (half[None, :] + R // 2) * x_stride_r, mask=real, other=0.0)
        angle = batch * angle_stride_b + token[:, None] * R + half[None, :]
        c = tl.load(cos + angle, mask=real, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=real, other=0.0).to(tl.float32)
        first, second = first.to(tl.float32), second.to(tl.float32)
        out_rows = out + batch * out_stride_b + token * out_stride_s + head * out_stride_h
        low = out_rows[:, None] + half[None, :] * out_stride_r
        # `out` may be `x`: every entry is read before one is written.
        tl.debug_barrier()
        dtype = out.dtype.element_ty
        tl.store(low, (first * c - second * s).to(dtype), mask=real)
        tl.store(low + R // 2 * out_stride_r, (second * c + first * s).to(dtype), mask=real)
