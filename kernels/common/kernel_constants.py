"""Numbers that several operations' kernels share, with their reasons."""

from __future__ import annotations

# Scores are kept in base 2, as the hardware's exponential is: `exp(x) = exp2(x LOG2_E)`, `log(x) = log2(x) LN_2`.
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# Wider latents (MLA's 512 + 64) leave shared memory for smaller blocks than narrower ones do.
WIDE_LATENT = 320
# Compute capabilities with 160 KB or more of shared memory a program; others have 99.
LARGE_SHARED_MEMORY = (80, 90, 100, 103)
# Those of them whose products read both operands from shared memory, and so want more stages and rows.
ASYNCHRONOUS_PRODUCTS = (90, 100, 103)
# What orders int32 with their sign: the least and the greatest.
LEAST_INT, GREATEST_INT = -(2**31), 2**31 - 1
