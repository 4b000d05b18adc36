"""Triton's interpreter (3.9) rounds to e4m3 wrongly: a carry out of the mantissa is lost. Here PyTorch converts."""

import numpy as np
import torch


def convert_e4m3_by_pytorch():
    """Let the interpreter of this process convert to and from e4m3 as PyTorch does, to nearest and even."""
    import triton.language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(values, from_type, to_type, rounding_mode):
        if to_type == tl.float8e4nv and from_type in (tl.float32, tl.float16):
            dtype = np.float32 if from_type == tl.float32 else np.float16
            wide = torch.from_numpy(np.ascontiguousarray(values).view(dtype).astype(np.float32))
            return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(np.shape(values))
        if from_type == tl.float8e4nv and to_type in (tl.float32, tl.float16):
            bits = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).copy())
            wide = bits.view(torch.float8_e4m3fn).float().numpy().reshape(np.shape(values))
            if to_type == tl.float32:
                return wide.view(np.uint32)
            return wide.astype(np.float16).view(np.uint16)
        return theirs(values, from_type, to_type, rounding_mode)

    interpreter._convert_float = convert
