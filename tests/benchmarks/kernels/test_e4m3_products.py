"""The model of Hopper's e4m3 accumulator cuts where it says, and nowhere else."""

import pytest
import torch

pytest.importorskip("triton")

from indexcache.benchmarks.kernels.e4m3_products import accumulator_model


def rows(*values):
    """One e4m3 row of 64 columns that begins with these values."""
    return torch.tensor([[*values, *[0.0] * (64 - len(values))]]).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "small, kept", [(2.0**-6, 2.0**-6), (-(2.0**-6), -(2.0**-6)), (2.0**-7, 0.0), (1.5 * 2.0**-6, 2.0**-6)]
)
def test_products_are_cut_thirteen_bits_below_the_largest(small, kept):
    # The largest product is 2**7.
    ones = rows(1.0, 1.0)
    assert accumulator_model(rows(128.0, small), ones).item() == 128.0 + kept


def test_later_columns_are_cut_by_the_sum_so_far():
    first = [1.0, *[0.0] * 31]
    q, k = rows(*[448.0] * 32, 1.0), rows(*[448.0] * 32, 0.5)
    # 32 * 448**2 lies between 2**22 and 2**23: its last bit is 2**9.
    assert accumulator_model(q, k).item() == 32 * 448.0**2
    assert accumulator_model(rows(*first, 1.0), rows(*first, 0.5)).item() == 1.5


def test_short_sums_of_small_integers_are_exact():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, (n, 128), generator=generator).float() for n in (5, 9))
    found = accumulator_model(q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn))
    assert torch.equal(found, (k @ q.t()).double())
