"""The sum over heads of a tile of weighted products, as Hopper's tensor cores leave it in registers, in Gluon."""

from __future__ import annotations

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError:
    gluon = None

if gluon is not None:
    # The weights of a thread's columns (pairs, 8 apart) stand in fours, those of a quad's lanes side by side.
    WEIGHTS_LAYOUT = gl.constexpr(gl.SharedLinearLayout([[1], [8], [2], [4], [16], [32], [64], [128]]))

    @gluon.jit
    def _from_lane(x, DISTANCE: gl.constexpr):
        """What the lane with one bit of its number flipped, the one worth DISTANCE (1 or 2), holds."""
        if DISTANCE == 2:
            got = gl.inline_asm_elementwise(
                "shfl.sync.bfly.b32 $0, $1, 2, 31, -1;", "=f,f", [x], gl.float32, is_pure=False, pack=1
            )
        else:
            got = gl.inline_asm_elementwise(
                "shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", "=f,f", [x], gl.float32, is_pure=False, pack=1
            )
        return got

    @gluon.jit
    def _halve(x, LANE_BIT: gl.constexpr):
        """Sum `x` [64, N, 4] over a bit of its last axis, the four lanes of a quad, and halve the work of each lane.

        The lanes whose bit is set keep the second half of the middle axis, the others the first: `[64, N / 2, 4]`.
        """
        N: gl.constexpr = x.shape[1]
        first, second = gl.split(gl.permute(gl.reshape(x, [64, 2, N // 2, 4]), (0, 2, 3, 1)))
        lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, first.type.layout)))
        upper = ((lane & LANE_BIT) != 0)[None, None, :]
        return gl.where(upper, second, first) + _from_lane(gl.where(upper, first, second), LANE_BIT)

    @gluon.jit
    def sum_over_heads(terms, BQ: gl.constexpr, H: gl.constexpr):
        """`[64, BQ * H]` as the tensor cores leave it to `[64, BQ]`, each score in one thread."""
        # Of 8 neighbouring columns a lane holds two and the others of its quad the rest.
        by_lane = gl.permute(gl.reshape(terms, [64, BQ, H // 8, 4, 2]), (0, 1, 3, 2, 4))
        parts = gl.sum(gl.reshape(by_lane, [64, BQ, 4, H // 4]), 3)  # [64, BQ, 4]
        parts = _halve(_halve(parts, 2), 1)  # [64, BQ / 4, 4]
        return gl.reshape(gl.permute(parts, (0, 2, 1)), [64, BQ])

else:  # Without Gluon the kernel that calls these does not exist either; importing their names must work.
    WEIGHTS_LAYOUT = sum_over_heads = None
