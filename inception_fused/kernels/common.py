"""Device code that the kernels share: tile order, maxima, borders, gradients, BatchNorm, epilogue, mask bits."""

import triton
import triton.language as tl

from inception_fused.block import batch_stats
from inception_fused.runtime.launch import INTERPRETED

MEAN, REST, VAR, SCALE, SHIFT = (
    tl.constexpr(row)
    for row in (batch_stats.MEAN, batch_stats.REST, batch_stats.VAR, batch_stats.SCALE, batch_stats.SHIFT)
)
"""Rows of a block's statistics; see block/batch_stats.py."""

ASSEMBLED = tl.constexpr(not INTERPRETED)
"""Whether pairs of 16-bit elements are compared by assembly, which Triton's interpreter does not know."""


@triton.jit
def tile_order(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) of a program: GROUP_M tile rows at a time, so that a wave shares rows of both operands in L2."""
    width = GROUP_M * num_n
    first_m = pid // width * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + pid % width % rows, pid % width // rows


@triton.jit
def quotient(a, size, BLOCK: tl.constexpr):
    """a // size for 0 <= a < size + BLOCK, BLOCK up to 512: a multiplication and a comparison an element.

    Where size < BLOCK, a * size < 2**20, and then the product below is exact; else the quotient is 0 or 1.
    """
    small = size < BLOCK
    inverse = tl.where(small, (1 << 20) // size + 1, 0)
    limit = tl.where(small, 0x7FFFFFFF, size)
    return ((a * inverse) >> 20) + (a >= limit).to(tl.int32)


@triton.jit
def coordinates(m0, offs_m, H, W, BLOCK_M: tl.constexpr):
    """(row, col) in their image of the pixels m0 + offs_m of a tile, divisions of its first pixel alone.

    Two divisions a row are about 50 instructions, this is 8 and four divisions of scalars (counted): for threads of
    many rows. In conv_fprop and B1, where a thread has one or two, it takes 30 to 60 instructions more.
    """
    row0 = m0 // W
    col = m0 - row0 * W + offs_m
    down = quotient(col, W, BLOCK_M)
    row = row0 % H + down
    return row - quotient(row, H, BLOCK_M) * H, col - down * W


@triton.jit
def largest(a, b):
    """The maximum, NaN where either is. Two elements of 16 bits an instruction: of bf16 Triton would widen each (K2's
    inference on sm_90: 122 instructions a step, as assembly 76)."""
    if ASSEMBLED and a.dtype.primitive_bitwidth == 16:
        PAIR: tl.constexpr = "f16x2" if a.dtype == tl.float16 else "bf16x2"
        asm: tl.constexpr = "max.NaN." + PAIR + " $0, $1, $2;"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2)
    else:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL).to(a.dtype)


@triton.jit
def largest_where(row, a, b, part):
    """The maximum of a and b in rows where ``row``, else a. part: no larger than a.

    Of two elements of 16 bits one bit operation behind the maximum chooses. A selection in front of it takes pairs
    apart (B4's pool on sm_90: 415 instructions a step, so 340). Not one predicate for both: nothing says that the two
    that a thread packs are of one row.
    """
    if ASSEMBLED and a.dtype.primitive_bitwidth == 16:
        PAIR: tl.constexpr = "f16x2" if a.dtype == tl.float16 else "bf16x2"
        asm: tl.constexpr = "{.reg .b32 most; max.NaN." + PAIR + " most, $1, $2; lop3.b32 $0, most, $1, $3, 0xE4;}"
        rows = tl.where(row, -1, 0).to(tl.int16)[:, None]
        return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, rows], dtype=a.dtype, is_pure=True, pack=2)
    else:
        return largest(a, tl.where(row[:, None], b, part))


@triton.jit
def larger(best, arg, x, name):
    """(the maximum of best and x, NaN where either is; name where x is greater, else arg), names of int16.

    fp16 two at a time: a comparison writes ones into half a register, which then chooses between two pairs of names
    (K2's training on sm_90: 255 instructions a step, so 187). On pairs of bf16 such a comparison needs sm_90.
    """
    if ASSEMBLED and x.dtype == tl.float16:
        asm: tl.constexpr = (
            "{.reg .b32 wins; set.gt.u32.f16x2 wins, $4, $2; lop3.b32 $1, wins, $5, $3, 0xCA; "
            "max.NaN.f16x2 $0, $2, $4;}"
        )
        return tl.inline_asm_elementwise(
            asm, "=&r,=&r,r,r,r,r", [best, arg, x, name], dtype=(tl.float16, tl.int16), is_pure=True, pack=2
        )
    else:
        return largest(best, x), tl.where(x > best, name, arg)


@triton.jit
def in_byte(tap, n):
    """Taps [BLOCK_M] for channels [BLOCK_N], int16, at their place in a byte: an odd channel's four bits above."""
    return (tap[:, None] << (4 * (n & 1))[None, :]).to(tl.int16)


@triton.jit
def store_taps(taps_ptrs, arg, mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Taps [BLOCK_M, BLOCK_N] as in_byte() has them, two channels a byte."""
    even, odd = tl.split(tl.reshape(arg, [BLOCK_M, BLOCK_N // 2, 2]))
    tl.store(taps_ptrs, (even | odd).to(tl.uint8), mask=mask)


@triton.jit
def border_word(row, col, H, W):
    """Which rows and columns of a 5x5 window around a pixel lie in the image: bit i where row + i - 2 does, bit 8 + i
    where col + i - 2 does."""
    word = tl.zeros_like(row)
    for i in tl.static_range(5):
        word |= ((row + i >= 2) & (row + i < H + 2)).to(tl.int32) << i
        word |= ((col + i >= 2) & (col + i < W + 2)).to(tl.int32) << (8 + i)
    return word


@triton.jit
def border_bits(row, col):
    """The bits of a border_word() that say of a tap, (row, col) from the window's middle, that it lies in the image."""
    return (1 << (row + 2)) | (1 << (col + 10))


@triton.jit
def by_branch(at, end1, end2, end3, first, second, third, fourth):
    """The value of the branch that tile ``at`` of columns belongs to; end1 to end3 are where the branches end."""
    return tl.where(at < end1, first, tl.where(at < end2, second, tl.where(at < end3, third, fourth)))


@triton.jit
def place_of(at, end1, end2, end3, K1, K2, K3, K4, g1, g2, g3, g4):
    """(tile in its branch, the branch's width, its first column, its place in a row of g) of tile ``at`` of columns."""
    tile = at - by_branch(at, end1, end2, end3, 0, end1, end2, end3)
    K = by_branch(at, end1, end2, end3, K1, K2, K3, K4)
    first = by_branch(at, end1, end2, end3, 0, K1, K1 + K2, K1 + K2 + K3)
    return tile, K, first, by_branch(at, end1, end2, end3, g1, g2, g3, g4)


@triton.jit
def write_borders(borders_ptr, words, offs_m, H, W, BLOCK_M: tl.constexpr):
    """B4's words (border_word), shared out among the programs of axis 0."""
    for q0 in range(tl.program_id(0) * BLOCK_M, words, tl.num_programs(0) * BLOCK_M):
        q = q0 + offs_m
        tl.store(borders_ptr + q, border_word(q // W % H, q % W, H, W).to(tl.int16), mask=q < words)


@triton.jit
def load_gradient(
    dy_ptr, m0, offs_m, first, n, mask, H, W, n_stride, c_stride, h_stride, w_stride, ROWS: tl.constexpr
):  # fmt: skip
    """Pixels m0 + offs_m, channels first + n of dy [N, K, H, W] of any strides; a matrix of ROWS needs w_stride."""
    if ROWS:
        dy_tile = dy_ptr + (m0.to(tl.int64) * w_stride + first)
        return tl.load(dy_tile + (offs_m[:, None] * w_stride + n[None, :]), mask=mask, other=0.0)
    else:
        pixel = m0 + offs_m
        image, row, column = (pixel // (H * W)).to(tl.int64), pixel // W % H, pixel % W
        dy_rows = dy_ptr + (image * n_stride + row.to(tl.int64) * h_stride + column.to(tl.int64) * w_stride)
        columns = (first + n).to(tl.int64) * c_stride
        return tl.load(dy_rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def add_gemm(
    acc, x_ptr, w_ptr, m0, offs_m, mask_m, pid_n, C, K, x_offset, x_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + the tile of x @ w^T at row m0: x [M, C] rows, w [K, C] dense, acc [BLOCK_M, BLOCK_N]."""
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < K
    offs_k = tl.arange(0, BLOCK_K)
    # Bases advance to the tile in int64; offsets inside the tile stay in int32.
    x_ptrs = x_ptr + (m0.to(tl.int64) * x_stride + x_offset) + (offs_m[:, None] * x_stride + offs_k[None, :])
    w_ptrs = w_ptr + (n[None, :] * C + offs_k[:, None])
    for k0 in range(0, C, BLOCK_K):
        mask_k = offs_k < C - k0
        x = tl.load(x_ptrs + k0, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs + k0, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="tf32", out_dtype=acc.dtype)
    return acc


@triton.jit
def numbers(table_ptr, row, offset, stride, n, mask_n):
    """Columns ``offset`` + n of a row of statistics or coefficients; 0 where not ``mask_n``.

    Loads are 16 bytes wide where places are known to be multiples of four: N3 has 10 loads then and 28 otherwise, N6 20
    and 56 (bf16, sm_90, Triton 3.6.0).
    """
    return tl.load(table_ptr + (row * stride + offset) + n, mask=mask_n, other=0.0)


@triton.jit
def affine(stats_ptr, offset, stride, n, mask_n):
    """(mean, scale, shift) of columns ``offset`` + n, as normalised() takes them."""
    mean = numbers(stats_ptr, MEAN, offset, stride, n, mask_n)
    scale = numbers(stats_ptr, SCALE, offset, stride, n, mask_n)
    return mean, scale, numbers(stats_ptr, SHIFT, offset, stride, n, mask_n)


@triton.jit
def normalised(raw, mean, scale, shift):
    """(raw - mean, act's argument as it is stored): raw [BLOCK_M, BLOCK_N], the others [BLOCK_N].

    Whoever masks by it gets the bits that were stored: a multiplication and an addition might be fused or not.
    """
    centred = raw.to(mean.dtype) - mean[None, :]
    return centred, tl.fma(centred, scale[None, :], shift[None, :]).to(raw.dtype)


@triton.jit
def affine_relu(acc, shift, scale, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr, RELU: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] -> activation(acc * scale + shift), scale and shift [BLOCK_N]."""
    if HAS_SCALE:
        acc = acc * scale.to(acc.dtype)[None, :]
    if HAS_SHIFT:
        acc = acc + shift.to(acc.dtype)[None, :]
    if RELU:
        # Not tl.maximum: a comparison keeps NaN, as PyTorch's ReLU does.
        acc = tl.where(acc < 0, 0.0, acc)
    return acc


@triton.jit
def pack_bits(y, mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bits of not (y <= 0), eight channels a byte: [BLOCK_M, BLOCK_N] -> uint8 [BLOCK_M, BLOCK_N // 8].

    y is the stored value after ReLU, so that a positive accumulator that rounds to zero masks as PyTorch's does. It
    is positive, NaN, 0.0 or -0.0; what passes is whatever has a bit other than the sign.
    """
    if y.dtype.primitive_bitwidth == 16:
        # A comparison of bf16 would widen every element to fp32 first: 56 bytes of stack at 128x128 on sm_80.
        passes = (y.to(tl.int16, bitcast=True) & 0x7FFF) != 0
    else:
        passes = y != 0
    bits = (mask & passes).to(tl.uint8)
    # Pairs, then pairs of pairs: the first lie in one thread's registers in every MMA layout. One sum over eight
    # put up to 192 bytes on the stack at 128x128 on sm_90.
    bits = join_pairs(bits, 1, BLOCK_M, BLOCK_N // 2)
    bits = join_pairs(bits, 2, BLOCK_M, BLOCK_N // 4)
    return join_pairs(bits, 4, BLOCK_M, BLOCK_N // 8)


@triton.jit
def join_pairs(bits, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK_M, 2 * WIDTH] -> [BLOCK_M, WIDTH]: the odd element above the even one's SHIFT bits."""
    even, odd = tl.split(tl.reshape(bits, [BLOCK_M, WIDTH, 2]))
    return even | odd << SHIFT


@triton.jit
def store_slice(
    acc, shift_ptr, scale_ptr, y_ptr, bits_ptr, m0, offs_m, mask_m, pid_n,
    K, y_offset, y_stride, bits_offset, bits_stride,
    RELU: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE: tl.constexpr, SAVE_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Epilogue of a tile: acc [BLOCK_M, BLOCK_N] into rows m0 + offs_m, columns y_offset + n of y, with its bits."""
    tl.static_assert(RELU or not SAVE_BITS, "mask bits are ReLU's")
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < K
    shift = tl.load(shift_ptr + n, mask=mask_n, other=0.0) if HAS_SHIFT else 0.0
    scale = tl.load(scale_ptr + n, mask=mask_n, other=0.0) if HAS_SCALE else 1.0
    out = affine_relu(acc, shift, scale, HAS_SHIFT, HAS_SCALE, RELU).to(y_ptr.dtype.element_ty)

    if SAVE_BITS:
        # Before the store: after it a 128x128 tile of fp32 spills on sm_100 (128 bytes of stack).
        bits_tile = bits_ptr + (m0.to(tl.int64) * bits_stride + bits_offset)
        store_bits(bits_tile, out, offs_m, mask_m, pid_n, K, bits_stride, BLOCK_M, BLOCK_N)
    y_tile = y_ptr + (m0.to(tl.int64) * y_stride + y_offset)
    tl.store(y_tile + (offs_m[:, None] * y_stride + n[None, :]), out, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def store_bits(bits_tile, out, offs_m, mask_m, pid_n, K, bits_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mask bits of one tile of stored values; columns from K on are another slice's and count as zero."""
    mask_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N) < K
    offs_b = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    bits = pack_bits(out, mask_n[None, :], BLOCK_M, BLOCK_N)
    mask = mask_m[:, None] & (offs_b * 8 < K)[None, :]
    tl.store(bits_tile + (offs_m[:, None] * bits_stride + offs_b[None, :]), bits, mask=mask)
