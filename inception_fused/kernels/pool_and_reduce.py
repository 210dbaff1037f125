"""K2 and K1 in one launch: each program does what one of pool_proj does, or one of grouped_gemm.

    p[m, c]  = max over the 3x3 window of pixel m of x[., c]
    y4[m, k] = act(sum over c of p[m, c] * w4[k, c] * scale4[k] + shift4[k])                  and taps
    [y1 | r3 | r5][m] = act(x[m] @ [w1; w2; w3]^T * scale + shift)

Shapes:  as in pool_proj and grouped_gemm. A "p" ends the names of what belongs to the pool's half.
GEMM:    two, side by side in the grid: the programs of the pool, which take longer, then those of the product.

For few pixels, where neither has a tile for every multiprocessor: nothing is shared but the launch, and what a program
computes is, to the bit, what it would compute alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inception_fused.kernels import grouped_gemm, pool_proj
from inception_fused.kernels.grouped_gemm import grouped_gemm_program
from inception_fused.kernels.pool_proj import pool_proj_program
from inception_fused.runtime.launch import Call, launch_pair

RUN_TIME = [*(f"{name}p" for name in pool_proj.RUN_TIME), *grouped_gemm.RUN_TIME]


@triton.jit(do_not_specialize=RUN_TIME)
def pool_and_reduce_kernel(
    x_ptrp, w_ptrp, shift_ptrp, scale_ptrp, y_ptrp, bits_ptrp, taps_ptrp,
    Mp, Hp, Wp, Cp, Kp, x_stridep, y_offsetp, y_stridep, bits_offsetp, bits_stridep, taps_stridep,
    x_ptr, w1_ptr, w2_ptr, w3_ptr, shift1_ptr, shift2_ptr, shift3_ptr, scale1_ptr, scale2_ptr, scale3_ptr,
    y_ptr, r_ptr, bits_ptr,
    M, C, K1, K2, K3, r5, x_stride, y_stride, r_stride, bits_stride,
    UNIT: tl.constexpr, RELU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr,
    SAVE_BITS: tl.constexpr, SAVE_TAPS: tl.constexpr, ACC: tl.constexpr, STAGES2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M2: tl.constexpr, BLOCK_N2: tl.constexpr, BLOCK_K2: tl.constexpr, GROUP_M2: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.cdiv(Mp, BLOCK_M) * tl.cdiv(Kp * UNIT, BLOCK_N)
    if pid < programs:
        pool_proj_program(
            pid, x_ptrp, w_ptrp, shift_ptrp, scale_ptrp, y_ptrp, bits_ptrp, taps_ptrp,
            Mp, Hp, Wp, Cp, Kp, x_stridep, y_offsetp, y_stridep, bits_offsetp, bits_stridep, taps_stridep,
            UNIT, RELU, HAS_SHIFT, HAS_SCALE, SAVE_BITS, SAVE_TAPS, ACC, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
        )  # fmt: skip
    else:
        grouped_gemm_program(
            pid - programs, x_ptr, w1_ptr, w2_ptr, w3_ptr,
            shift1_ptr, shift2_ptr, shift3_ptr, scale1_ptr, scale2_ptr, scale3_ptr, y_ptr, r_ptr, bits_ptr,
            M, C, K1, K2, K3, r5, x_stride, y_stride, r_stride, bits_stride,
            UNIT, RELU, HAS_SHIFT, HAS_SCALE, SAVE_BITS, ACC, BLOCK_M2, BLOCK_N2, BLOCK_K2, GROUP_M2, STAGES2,
        )  # fmt: skip


def pool_and_reduce(reductions: Call, projection: Call) -> None:
    """Launch K1 and K2 as one.

    reductions: what grouped_gemm() takes; projection: what pool_proj() takes. They agree in unit, activation, dtype,
    whether scale and shift are given, whether bits are, and in the tile's warps.
    """
    halves = []
    for module, (args, given) in ((pool_proj, projection), (grouped_gemm, reductions)):
        halves.append((module.arguments(*args, **given), given["tile"]))
    launch_pair(pool_and_reduce_kernel, *halves)
