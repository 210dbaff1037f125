"""K3 and K4 in one launch: each program computes a tile of the one convolution or of the other, as conv_fprop does.

    y1[m, k] = act(sum over r, s, c of x1[pixel(m) + (r - P1, s - P1), c] * w1[k, r, s, c] * scale1[k] + shift1[k])
    y2, the same of x2, w2, P2

Shapes:  as in conv_fprop, for each.
GEMM:    two, side by side in the grid: the programs of the first, then those of the second.

For few pixels, where neither has a tile for every multiprocessor: nothing is shared but the launch, and what a program
computes is, to the bit, what it would compute alone. The larger window comes first, since its programs take longer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inception_fused.kernels.conv_fprop import RUN_TIME as OF_ONE
from inception_fused.kernels.conv_fprop import arguments, conv_fprop_program
from inception_fused.runtime.launch import Call, launch_pair

RUN_TIME = [f"{name}{half}" for half in (1, 2) for name in OF_ONE]


@triton.jit(do_not_specialize=RUN_TIME)
def conv_pair_kernel(
    x_ptr1, w_ptr1, shift_ptr1, scale_ptr1, y_ptr1, bits_ptr1,
    M1, H1, W1, R1, C1, K1, x_offset1, x_stride1, y_offset1, y_stride1, bits_offset1, bits_stride1,
    x_ptr2, w_ptr2, shift_ptr2, scale_ptr2, y_ptr2, bits_ptr2,
    M2, H2, W2, R2, C2, K2, x_offset2, x_stride2, y_offset2, y_stride2, bits_offset2, bits_stride2,
    SAVE_BITS1: tl.constexpr, SAVE_BITS2: tl.constexpr,
    UNIT: tl.constexpr, RELU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M2: tl.constexpr, BLOCK_N2: tl.constexpr, BLOCK_K2: tl.constexpr, GROUP_M2: tl.constexpr,
    STAGES2: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.cdiv(M1, BLOCK_M) * tl.cdiv(K1 * UNIT, BLOCK_N)
    if pid < programs:
        conv_fprop_program(
            pid, x_ptr1, w_ptr1, shift_ptr1, scale_ptr1, y_ptr1, bits_ptr1,
            M1, H1, W1, R1, C1, K1, x_offset1, x_stride1, y_offset1, y_stride1, bits_offset1, bits_stride1,
            UNIT, RELU, HAS_SHIFT, HAS_SCALE, SAVE_BITS1, ACC, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
        )  # fmt: skip
        # So that the halves end differently. Else the compiler makes one epilogue of both, ptxas lets every wgmma wait
        # for the one before (C7515), and a thread has up to 128 registers instead of 93 (sm_90).
        tl.debug_barrier()
    else:
        conv_fprop_program(
            pid - programs, x_ptr2, w_ptr2, shift_ptr2, scale_ptr2, y_ptr2, bits_ptr2,
            M2, H2, W2, R2, C2, K2, x_offset2, x_stride2, y_offset2, y_stride2, bits_offset2, bits_stride2,
            UNIT, RELU, HAS_SHIFT, HAS_SCALE, SAVE_BITS2, ACC, BLOCK_M2, BLOCK_N2, BLOCK_K2, GROUP_M2, STAGES2,
        )  # fmt: skip


def conv_pair(one: Call, other: Call) -> None:
    """Launch K3 and K4 as one.

    one, other: what conv_fprop() takes. They agree in unit, activation, dtype, whether scale and shift are given, and
    in the tile's warps.
    """
    # By the window's side, of w [K, C, R, R].
    calls = sorted((one, other), key=lambda call: -call[0][1].shape[-1])
    halves = [(arguments(*args, **given), given["tile"]) for args, given in calls]
    launch_pair(conv_pair_kernel, *halves, own=("SAVE_BITS",))
