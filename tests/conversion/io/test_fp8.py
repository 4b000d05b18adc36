"""Dequantising block-scaled fp8, ragged blocks included, against a loop over single elements."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.time_limits import PROCESS_SECONDS

from indexcache.conversion.io.checkpoint import TensorInfo
from indexcache.conversion.io.fp8 import dequantise_block
from indexcache.conversion.io.tensor_stream import read_scales


def slowly(weight, scale, block, dtype):
    result = torch.empty(weight.shape, dtype=torch.float32)
    wide = weight.float()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            result[row, column] = wide[row, column] * scale[row // block[0], column // block[1]]
    return result.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 9),
)
def test_equals_a_loop_over_elements(rows, columns, block, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 30).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator)
    result = dequantise_block(weight, scale, block, dtype)
    assert result.dtype == dtype and torch.equal(result, slowly(weight, scale, block, dtype))


def test_576_rows_have_five_rows_of_scales():
    weight = torch.ones(576, 256).to(torch.float8_e4m3fn)
    scale = torch.arange(10.0).reshape(5, 2)
    result = dequantise_block(weight, scale)
    assert result.shape == (576, 256) and result.dtype == torch.bfloat16
    assert result[575, 0] == 8 and result[511, 128] == 7 and result[512, 255] == 9


def test_slabs_join_without_a_seam():
    weight = (torch.randn(300, 70_000) * 10).to(torch.float8_e4m3fn)  # more than one slab of block rows
    scale = torch.rand(3, 547)
    wide = scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :70_000]
    assert torch.equal(dequantise_block(weight, scale, dtype=torch.float32), weight.float() * wide)


@pytest.mark.parametrize("grid", [(4, 2), (5, 3), (2, 5)])
def test_a_grid_that_does_not_fit_is_refused(grid):
    with pytest.raises(ValueError, match=r"do not fit a weight of shape \(576, 256\) in blocks of 128 x 128"):
        dequantise_block(torch.ones(576, 256).to(torch.float8_e4m3fn), torch.ones(grid))


def test_power_of_two_scales_of_one_byte_are_read_without_torch_s_dtype_for_them():
    codes = bytearray(range(256))
    read = read_scales(codes, TensorInfo("x_scale_inv", "a", "F8_E8M0", (16, 16), 0, 256))
    want = torch.frombuffer(codes, dtype=torch.float8_e8m0fnu).view(16, 16).float()
    assert read.dtype == torch.float32 and torch.equal(read.nan_to_num(), want.nan_to_num())
    assert read.isnan().sum() == want.isnan().sum() == 1
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    scale = read_scales(bytearray([128, 126]), TensorInfo("x_scale_inv", "a", "F8_E8M0", (1, 2), 0, 2))
    assert dequantise_block(weight, scale, (4, 2))[0].tolist() == [2, 2, 0.5, 0.5]


def test_conversion_imports_where_torch_lacks_that_dtype():
    script = (
        "import torch, torch._inductor.utils, transformers.modeling_utils\n"  # this torch's own files read it
        "del torch.float8_e8m0fnu\n"
        "import indexcache.conversion.convert.convert, indexcache.conversion.check.verify\n"
        "import indexcache.conversion.io.tensor_stream"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PROCESS_SECONDS)
