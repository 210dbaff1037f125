// K1 on sm_80 and up: the three 1x1 reductions of a block as one grouped GEMM. Device code only.
//
//     out[m, n] = act(sum_k x[m, k] * w[n, k] * scale[n] + shift[n])        n over the columns of all three groups
//
// Shapes:  as in grouped_gemm.h; the groups' columns lie end to end, n in [0, k[0] + k[1] + k[2]).
// GEMM:    GEMM_M = m = N*H*W, GEMM_N = k[0] + k[1] + k[2], GEMM_K = c.
// Layouts: x and w are both K-major, which is what mma's row.col form wants: nothing is transposed anywhere.
//
// A tile of columns may straddle groups, so groups of 16, 24 or 32 columns waste nothing but the last tile's rest.
// Four warps share a tile as 2 x 2. Operands pass through a ring of STAGES slots of 64-byte rows, filled by cp.async
// and read by ldmatrix; a row's four chunks are swizzled so that both are free of bank conflicts. 64 bytes, not 128:
// the channels of the nine blocks are multiples of 16, and 528 would leave 8% of 128-byte steps empty.
// Every element's sum runs over k in the same order in every tile, so a result does not depend on the batch.
#pragma once

#include "grouped_gemm.h"
#include "ptx.cuh"

namespace inception_fused {

template <class Element_, int BLOCK_M_, int BLOCK_N_, bool ALIGNED_>
struct GroupedGemmConfig {
  using Element = Element_;
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_;
  static constexpr bool ALIGNED = ALIGNED_;

  static constexpr int WARPS_M = 2, WARPS_N = 2, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int STAGES = 4;
  static constexpr int GROUP_M = 8;  // tile rows that run side by side, for reuse of both operands in L2

  static constexpr int CHUNK = 16 / sizeof(Element);  // elements in 16 bytes
  static constexpr int ROW_CHUNKS = 4, ROW_BYTES = 16 * ROW_CHUNKS;
  static constexpr int BLOCK_K = CHUNK * ROW_CHUNKS;
  static constexpr int MMA_M = 16, MMA_N = 8, MMA_CHUNKS = 2;  // one matrix instruction; 32 bytes of K

  static constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;
  static constexpr int FRAGMENTS_M = WARP_M / MMA_M, FRAGMENTS_N = WARP_N / MMA_N;

  static constexpr int COPY_ROWS = THREADS / ROW_CHUNKS;  // rows that one pass of all threads copies
  static constexpr int X_COPIES = BLOCK_M / COPY_ROWS, W_COPIES = BLOCK_N / COPY_ROWS;
  static constexpr int STAGE_BYTES = (BLOCK_M + BLOCK_N) * ROW_BYTES, RING_BYTES = STAGES * STAGE_BYTES;

  // The finished tile, in the ring's place. Rows are whole lines of 128 bytes, so that a swizzle stays inside one.
  static constexpr int RESULT_PITCH = (BLOCK_N * static_cast<int>(sizeof(Element)) + 127) / 128 * 128;
  static constexpr int RESULT_BYTES = BLOCK_M * RESULT_PITCH;
  static constexpr int AFFINE = RING_BYTES > RESULT_BYTES ? RING_BYTES : RESULT_BYTES;  // scale, shift: 2 x BLOCK_N
  static constexpr int SHARED_BYTES = AFFINE + 2 * BLOCK_N * static_cast<int>(sizeof(float));

  static_assert(sizeof(Element) == 2 || sizeof(Element) == 4, "swizzles are made for these two");
  static_assert(BLOCK_M % (WARPS_M * MMA_M) == 0, "a warp holds whole matrices");
  static_assert(BLOCK_N % (WARPS_N * 2 * MMA_N) == 0, "a warp loads two matrices of columns at a time");
  static_assert(BLOCK_M % COPY_ROWS == 0 && BLOCK_N % COPY_ROWS == 0, "every thread copies alike");
  static_assert(COPY_ROWS % 8 == 0, "a thread's rows all have the same swizzle");
  static_assert(BLOCK_N % 8 == 0, "a byte of mask bits lies in one tile");
  static_assert(ROW_CHUNKS % MMA_CHUNKS == 0, "a slot holds whole steps of K");
  static_assert(SHARED_BYTES <= 99 * 1024, "99 KB is the limit of sm_86, sm_89 and sm_120, the least of all");
};

// Shared memory

// 16-byte chunk of an operand row. Two rows share a line of 128 bytes; the XOR spreads eight rows over its banks.
__device__ __forceinline__ ptx::SharedAddress operand_chunk(int row, int chunk) {
  return row * 64 + (chunk ^ (row >> 1 & 3)) * 16;
}

// Element (row, column) of the finished tile. The XOR lets a warp store its fragments without conflicts: in 16-bit
// types a quad of lanes fills one chunk and eight rows are stored at once, in 32-bit types two chunks and four rows.
template <class Config>
__device__ __forceinline__ ptx::SharedAddress result_element(int row, int column) {
  constexpr int SIZE = sizeof(typename Config::Element);
  const int swizzle = SIZE == 2 ? row & 7 : (row & 3) << 1;
  return row * Config::RESULT_PITCH + ((column / Config::CHUNK) ^ swizzle) * 16 + column % Config::CHUNK * SIZE;
}

// Groups

// Where column n of all groups lies: its group (kGroups: none) and its column there.
struct Column {
  int group, index;
};

__device__ __forceinline__ Column find_column(const GroupedGemm& p, int n) {
  if (n < p.k[0]) return {0, n};
  n -= p.k[0];
  if (n < p.k[1]) return {1, n};
  n -= p.k[1];
  return {n < p.k[2] ? 2 : kGroups, n};
}

// Not an index into the argument: that would be copied to local memory.
__device__ __forceinline__ const void* choose(const void* const (&of)[kGroups], int group) {
  return group == 0 ? of[0] : group == 1 ? of[1] : of[2];
}

// Address of column n in row m of its destination, null where there is none.
template <class Element>
__device__ __forceinline__ Element* destination(const GroupedGemm& p, long long m, int n) {
  const Column column = find_column(p, n);
  if (column.group == 0) return static_cast<Element*>(p.y) + m * p.y_stride + column.index;
  Element* row = static_cast<Element*>(p.r) + m * p.r_stride + column.index;
  return column.group == 1 ? row : column.group == 2 ? row + p.r5 : nullptr;
}

// Prologue: which tile, which rows

struct TileOrigin {
  int m, n;
};

// GROUP_M tile rows at a time, columns innermost but one, so that tiles that run together share x and w in L2.
template <class Config>
__device__ __forceinline__ TileOrigin tile_origin(const GroupedGemm& p, int block) {
  const int tiles_m = (p.m - 1) / Config::BLOCK_M + 1;
  const int tiles_n = (p.k[0] + p.k[1] + p.k[2] - 1) / Config::BLOCK_N + 1;
  const int width = Config::GROUP_M * tiles_n;
  const int first = block / width * Config::GROUP_M;
  const int rows = min(tiles_m - first, Config::GROUP_M);
  return {(first + block % width % rows) * Config::BLOCK_M, block % width / rows * Config::BLOCK_N};
}

// What one thread copies in every step: one chunk of K in each of these rows. Null: no such row, zeros instead.
template <class Config>
struct CopyRows {
  using Element = typename Config::Element;
  const Element* x[Config::X_COPIES];
  const Element* w[Config::W_COPIES];
};

template <class Config>
__device__ __forceinline__ CopyRows<Config> copy_rows(const GroupedGemm& p, TileOrigin origin) {
  using Element = typename Config::Element;
  CopyRows<Config> rows;
  const int row = ptx::thread_index() / Config::ROW_CHUNKS;
#pragma unroll
  for (int i = 0; i < Config::X_COPIES; ++i) {
    const int m = origin.m + row + i * Config::COPY_ROWS;
    rows.x[i] = m < p.m ? static_cast<const Element*>(p.x) + m * p.x_stride : nullptr;
  }
#pragma unroll
  for (int i = 0; i < Config::W_COPIES; ++i) {
    const Column column = find_column(p, origin.n + row + i * Config::COPY_ROWS);
    const auto* w = static_cast<const Element*>(choose(p.w, column.group));
    rows.w[i] = column.group < kGroups ? w + static_cast<long long>(column.index) * p.c : nullptr;
  }
  return rows;
}

__device__ __forceinline__ float vector_element(const void* vector, VectorType type, int i) {
  switch (type) {
    case VectorType::fp16:
      return ptx::to_float(static_cast<const fp16*>(vector)[i]);
    case VectorType::bf16:
      return ptx::to_float(static_cast<const bf16*>(vector)[i]);
    case VectorType::fp64:
      return static_cast<float>(static_cast<const double*>(vector)[i]);
    default:
      return static_cast<const float*>(vector)[i];
  }
}

// The tile's scale and shift into shared memory; the main loop's barriers lie between this and their first use.
template <class Config>
__device__ __forceinline__ void load_affine(const GroupedGemm& p, int n0) {
  for (int n = ptx::thread_index(); n < Config::BLOCK_N; n += Config::THREADS) {
    const Column column = find_column(p, n0 + n);
    float scale = 1.0f, shift = 0.0f;
    if (column.group < kGroups) {
      if (p.scale_type != VectorType::none)
        scale = vector_element(choose(p.scale, column.group), p.scale_type, column.index);
      if (p.shift_type != VectorType::none)
        shift = vector_element(choose(p.shift, column.group), p.shift_type, column.index);
    }
    ptx::store_shared(Config::AFFINE + n * sizeof(float), scale);
    ptx::store_shared(Config::AFFINE + (Config::BLOCK_N + n) * sizeof(float), shift);
  }
}

// Main loop

// CHUNK elements of one row from column k on; zeros beyond the row's end and where there is no row. An unaligned row
// is read element by element: it may begin anywhere.
template <class Config>
__device__ __forceinline__ void copy_chunk(ptx::SharedAddress to, const typename Config::Element* row, const void* any,
                                           int k, int c) {
  if constexpr (Config::ALIGNED) {
    const bool valid = row != nullptr && k < c;
    ptx::copy_async(to, valid ? static_cast<const void*>(row + k) : any, valid ? 16 : 0);
  } else {
    union {
      ptx::Chunk chunk;
      typename Config::Element element[Config::CHUNK];
    } out;
    out.chunk = {};
#pragma unroll
    for (int e = 0; e < Config::CHUNK; ++e)
      if (row != nullptr && k + e < c) out.element[e] = row[k + e];
    ptx::store_shared(to, out.chunk);
  }
}

// Step of K into its slot of the ring, and one group of copies whether or not there is such a step.
template <class Config>
__device__ __forceinline__ void load_step(const GroupedGemm& p, const CopyRows<Config>& rows, int step, int steps) {
  if (step < steps) {
    const int chunk = ptx::thread_index() % Config::ROW_CHUNKS, row = ptx::thread_index() / Config::ROW_CHUNKS;
    const int k = step * Config::BLOCK_K + chunk * Config::CHUNK;
    const ptx::SharedAddress slot = step % Config::STAGES * Config::STAGE_BYTES + operand_chunk(row, chunk);
#pragma unroll
    for (int i = 0; i < Config::X_COPIES; ++i)
      copy_chunk<Config>(slot + i * Config::COPY_ROWS * Config::ROW_BYTES, rows.x[i], p.x, k, p.c);
#pragma unroll
    for (int i = 0; i < Config::W_COPIES; ++i)
      copy_chunk<Config>(slot + (Config::BLOCK_M + i * Config::COPY_ROWS) * Config::ROW_BYTES, rows.w[i], p.x, k, p.c);
  }
  ptx::commit_copies();
}

// TF32's matrix instruction drops 13 bits of an operand, which shrinks it by 0.72 * 2**-11 on average (1 / (2 ln 2),
// the mean of one over the fraction, times half a unit). Made larger by as much first, its mean error is 0 and its RMS
// error 1.06 times that of rounding to nearest; a value that has no such bits stays what it is. A multiplication keeps
// NaN, which rounding by integer addition can lose. What it costs on a GPU is not measured.
template <class Element>
__device__ __forceinline__ void centre_operand(unsigned (&fragment)[4]) {
  if constexpr (sizeof(Element) == 4) {
#pragma unroll
    for (unsigned& word : fragment) word = ptx::as_bits(ptx::as_float(word) * (1.0f + 0.72135f / 2048));
  }
}

template <class Config>
using Accumulators = float[Config::FRAGMENTS_M][Config::FRAGMENTS_N][4];

// One step of K from its slot.
template <class Config>
__device__ __forceinline__ void multiply_step(Accumulators<Config>& acc, int step) {
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
  const int x_row = warp / Config::WARPS_N * Config::WARP_M + lane % 16;
  const int w_row = warp % Config::WARPS_N * Config::WARP_N + lane % 8 + lane / 16 * 8;
  const ptx::SharedAddress x = step % Config::STAGES * Config::STAGE_BYTES;
  const ptx::SharedAddress w = x + Config::BLOCK_M * Config::ROW_BYTES;
#pragma unroll
  for (int chunk = 0; chunk < Config::ROW_CHUNKS; chunk += Config::MMA_CHUNKS) {
    unsigned a[Config::FRAGMENTS_M][4], b[Config::FRAGMENTS_N / 2][4];
#pragma unroll
    for (int i = 0; i < Config::FRAGMENTS_M; ++i) {
      ptx::load_matrices(a[i], x + operand_chunk(x_row + i * Config::MMA_M, chunk + lane / 16));
      centre_operand<typename Config::Element>(a[i]);
    }
#pragma unroll
    for (int j = 0; j < Config::FRAGMENTS_N / 2; ++j) {
      ptx::load_matrices(b[j], w + operand_chunk(w_row + j * 2 * Config::MMA_N, chunk + lane / 8 % 2));
      centre_operand<typename Config::Element>(b[j]);
    }
#pragma unroll
    for (int i = 0; i < Config::FRAGMENTS_M; ++i)
#pragma unroll
      for (int j = 0; j < Config::FRAGMENTS_N; ++j)
        ptx::multiply_add(acc[i][j], a[i], b[j / 2] + j % 2 * 2, typename Config::Element{});
  }
}

template <class Config>
__device__ __forceinline__ void main_loop(Accumulators<Config>& acc, const GroupedGemm& p, TileOrigin origin) {
  const CopyRows<Config> rows = copy_rows<Config>(p, origin);
  const int steps = (p.c - 1) / Config::BLOCK_K + 1;
#pragma unroll
  for (int step = 0; step < Config::STAGES - 1; ++step) load_step<Config>(p, rows, step, steps);
  load_affine<Config>(p, origin.n);  // while the first copies are under way
  for (int step = 0; step < steps; ++step) {
    ptx::wait_copies<Config::STAGES - 2>();
    // One barrier serves both ends: this step has arrived for all, and nobody reads the slot that is filled next.
    ptx::sync_threads();
    load_step<Config>(p, rows, step + Config::STAGES - 1, steps);
    multiply_step<Config>(acc, step);
  }
}

// Epilogue

__device__ __forceinline__ float affine_relu(float acc, float scale, float shift, bool relu) {
  const float value = acc * scale + shift;
  // A comparison keeps NaN, as PyTorch's ReLU does.
  return relu && value < 0.0f ? 0.0f : value;
}

// Whether element e of a chunk passes ReLU's gradient: after ReLU, whatever has a bit other than the sign, NaN too.
template <class Element>
__device__ __forceinline__ bool passes(const ptx::Chunk& chunk, int e) {
  if constexpr (sizeof(Element) == 2) return (chunk.word[e / 2] >> e % 2 * 16 & 0x7fffu) != 0;
  return (chunk.word[e] & 0x7fffffffu) != 0;
}

// Accumulators -> finished values in shared memory.
template <class Config>
__device__ __forceinline__ void stage_result(const Accumulators<Config>& acc, bool relu) {
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
  const int row0 = warp / Config::WARPS_N * Config::WARP_M + lane / 4;
  const int column0 = warp % Config::WARPS_N * Config::WARP_N + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < Config::FRAGMENTS_N; ++j) {
    const int column = column0 + j * Config::MMA_N;
    const auto scale = ptx::load_shared<ptx::Pair>(Config::AFFINE + column * sizeof(float));
    const auto shift = ptx::load_shared<ptx::Pair>(Config::AFFINE + (Config::BLOCK_N + column) * sizeof(float));
#pragma unroll
    for (int i = 0; i < Config::FRAGMENTS_M; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first = affine_relu(acc[i][j][2 * half], scale.first, shift.first, relu);
        const float second = affine_relu(acc[i][j][2 * half + 1], scale.second, shift.second, relu);
        const int row = row0 + i * Config::MMA_M + half * 8;
        ptx::store_shared(result_element<Config>(row, column),
                          ptx::round_pair(first, second, typename Config::Element{}));
      }
  }
}

// Shared memory -> slices and mask bits. A thread takes eight columns of a row, which is one byte of bits.
template <class Config>
__device__ __forceinline__ void store_result(const GroupedGemm& p, TileOrigin origin) {
  using Element = typename Config::Element;
  constexpr int OCTETS = Config::BLOCK_N / 8;
  for (int i = ptx::thread_index(); i < Config::BLOCK_M * OCTETS; i += Config::THREADS) {
    const int row = i / OCTETS, octet = i % OCTETS * 8;
    if (origin.m + row >= p.m) break;
    const long long m = origin.m + row;
    unsigned bits = 0;
#pragma unroll
    for (int part = 0; part < 8; part += Config::CHUNK) {
      const int n = origin.n + octet + part;
      const auto chunk = ptx::load_shared<ptx::Chunk>(result_element<Config>(row, octet + part));
#pragma unroll
      for (int e = 0; e < Config::CHUNK; ++e)
        if (n + e < p.k[0] && passes<Element>(chunk, e)) bits |= 1u << (part + e);
      if constexpr (Config::ALIGNED) {
        if (Element* to = destination<Element>(p, m, n)) *reinterpret_cast<ptx::Chunk*>(to) = chunk;
      } else {
        union {
          ptx::Chunk chunk;
          Element element[Config::CHUNK];
        } out;
        out.chunk = chunk;
#pragma unroll
        for (int e = 0; e < Config::CHUNK; ++e)
          if (Element* to = destination<Element>(p, m, n + e)) *to = out.element[e];
      }
    }
    const int n = origin.n + octet;
    if (p.bits != nullptr && n < p.k[0]) p.bits[m * p.bits_stride + n / 8] = static_cast<unsigned char>(bits);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::THREADS) grouped_gemm_kernel(const __grid_constant__ GroupedGemm p) {
  const TileOrigin origin = tile_origin<Config>(p, ptx::block_index());
  Accumulators<Config> acc = {};
  main_loop<Config>(acc, p, origin);
  // The result takes the ring's place, which other warps may still be reading. No copy is under way: the last step
  // waited for the last copies, and the groups after it are empty.
  ptx::sync_threads();
  stage_result<Config>(acc, p.relu != 0);
  ptx::sync_threads();
  store_result<Config>(p, origin);
}

}  // namespace inception_fused
