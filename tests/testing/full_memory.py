"""A GPU whose memory is all taken: PyTorch's allocator refuses, as when other tensors have filled the device."""

import gc
from contextlib import contextmanager, suppress

import torch

# What is left over in memory that the allocator has already is taken in pieces down to its smallest; up to 1 MB they
# come from other memory than larger ones, so that one of these is little above.
PIECES = (*(2**exponent for exponent in range(26, 20, -1)), 5 * 2**18, *(2**exponent for exponent in range(20, 8, -1)))


@contextmanager
def full_memory(spare=False):
    """Let the current device have no memory for new tensors.

    Args:
        spare: leave what is free in pieces that the allocator shares with living tensors: no more memory can be asked
            of the device, but small tensors find room there.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    held = []
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        for size in () if spare else PIECES:
            with suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        yield
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def same_bits():
    """Operations add up in a fixed order, and what they leave unwritten is the same every time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def equal_bits(one, other):
    """Whether two tensors hold the same, NaN included."""
    return one.dtype == other.dtype and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (one, other)))
