// One tile of a GEMM on sm_80 and up: what the kernels of this folder share. Device code only.
//
//     acc[i, j] = sum_k a[i, k] * b[j, k]
//
// Both operands are K-major, which is what mma's row.col form wants: nothing is transposed anywhere.
//
// Four warps share a tile as 2 x 2. Operands pass through a ring of STAGES slots of 64-byte rows, filled by cp.async
// and read by ldmatrix; a row's four chunks are swizzled so that both are free of bank conflicts. 64 bytes, not 128:
// the channels of the nine blocks are multiples of 16, and 528 would leave 8% of 128-byte steps empty.
// Every element's sum runs over k in the same order in every tile, so a result does not depend on the batch.
//
// A kernel says what its operands are by a struct Operands:
//   int m() const, n() const, k() const         sizes of the product
//   const Element* a(int i) const, b(int j)     first element of row i of a, of row j of b; null: no such row
//   const void* any() const                     an address, for copies that read nothing
#pragma once

#include "ptx.cuh"

namespace inception_fused {

// Result: the type in which a finished tile is staged.
template <class Element_, int BLOCK_M_, int BLOCK_N_, bool ALIGNED_, class Result_>
struct GemmTile {
  using Element = Element_;
  using Result = Result_;
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_;
  static constexpr bool ALIGNED = ALIGNED_;

  static constexpr int WARPS_M = 2, WARPS_N = 2, THREADS = 32 * WARPS_M * WARPS_N;
  // Two steps under way while one is computed: by the data sheets' rates 64 bytes of K of 128x128 are 500 cycles of
  // matrix instructions a warp on an A100 and 1000 on an RTX 4090. A fourth slot would leave one block to a
  // multiprocessor of 100 KB, not two.
  static constexpr int STAGES = 3;
  static constexpr int GROUP_M = 8;  // tile rows that run side by side, for reuse of both operands in L2

  static constexpr int CHUNK = 16 / sizeof(Element);  // elements in 16 bytes
  static constexpr int ROW_CHUNKS = 4, ROW_BYTES = 16 * ROW_CHUNKS;
  static constexpr int BLOCK_K = CHUNK * ROW_CHUNKS;
  static constexpr int MMA_M = 16, MMA_N = 8, MMA_CHUNKS = 2;  // one matrix instruction; 32 bytes of K

  static constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;
  static constexpr int FRAGMENTS_M = WARP_M / MMA_M, FRAGMENTS_N = WARP_N / MMA_N;

  static constexpr int COPY_ROWS = THREADS / ROW_CHUNKS;  // rows that one pass of all threads copies
  static constexpr int A_COPIES = BLOCK_M / COPY_ROWS, B_COPIES = BLOCK_N / COPY_ROWS;
  static constexpr int STAGE_BYTES = (BLOCK_M + BLOCK_N) * ROW_BYTES, RING_BYTES = STAGES * STAGE_BYTES;

  // The finished tile, in the ring's place. Rows are whole lines of 128 bytes, so that a swizzle stays inside one.
  static constexpr int RESULT_CHUNK = 16 / sizeof(Result);
  static constexpr int RESULT_PITCH = (BLOCK_N * static_cast<int>(sizeof(Result)) + 127) / 128 * 128;
  static constexpr int RESULT_BYTES = BLOCK_M * RESULT_PITCH;
  static constexpr int TILE_BYTES = RING_BYTES > RESULT_BYTES ? RING_BYTES : RESULT_BYTES;  // a kernel's own: beyond

  static_assert(sizeof(Element) == 2 || sizeof(Element) == 4, "swizzles are made for these two");
  static_assert(sizeof(Result) == 2 || sizeof(Result) == 4, "swizzles are made for these two");
  static_assert(BLOCK_M % (WARPS_M * MMA_M) == 0, "a warp holds whole matrices");
  static_assert(BLOCK_N % (WARPS_N * 2 * MMA_N) == 0, "a warp loads two matrices of columns at a time");
  static_assert(BLOCK_M % COPY_ROWS == 0 && BLOCK_N % COPY_ROWS == 0, "every thread copies alike");
  static_assert(COPY_ROWS % 8 == 0, "a thread's rows all have the same swizzle");
  static_assert(BLOCK_N % CHUNK == 0, "a row of the tile is whole chunks");
  static_assert(ROW_CHUNKS % MMA_CHUNKS == 0, "a slot holds whole steps of K");
};

// The least limit of all that these run on.
constexpr int kSharedLimit = 99 * 1024;  // sm_86, sm_89, sm_120

// Shared memory

// 16-byte chunk of an operand row. Two rows share a line of 128 bytes; the XOR spreads eight rows over its banks.
__device__ __forceinline__ ptx::SharedAddress operand_chunk(int row, int chunk) {
  return row * 64 + (chunk ^ (row >> 1 & 3)) * 16;
}

// Element (row, column) of the finished tile. The XOR lets a warp store its fragments without conflicts: in 16-bit
// types a quad of lanes fills one chunk and eight rows are stored at once, in 32-bit types two chunks and four rows.
// And it lets eight lanes read without, neighbouring chunks in 16-bit types and every second one in 32-bit types, also
// where a row of 96 columns ends between them. tests/csrc/sim/banks.cpp counts.
template <class Config>
__device__ __forceinline__ ptx::SharedAddress result_element(int row, int column) {
  constexpr int SIZE = sizeof(typename Config::Result);
  const int chunk = column / Config::RESULT_CHUNK;
  int swizzle = SIZE == 2 ? (row & 1) << 2 | (row >> 1 & 3) : (row & 3) << 1;
  // Readers of single elements wait for memory in any case, and spilled 8 bytes on sm_100 with it.
  if constexpr (SIZE == 4 && Config::ALIGNED) swizzle ^= (chunk >> 3 ^ row) & 1;
  return row * Config::RESULT_PITCH + (chunk ^ swizzle) * 16 + column % Config::RESULT_CHUNK * SIZE;
}

// Prologue: which tile, which rows

struct TileOrigin {
  int m, n;
};

// GROUP_M tile rows at a time, columns innermost but one, so that tiles that run together share a and b in L2.
template <class Config, class Operands>
__device__ __forceinline__ TileOrigin tile_origin(const Operands& operands, int block) {
  const int tiles_m = (operands.m() - 1) / Config::BLOCK_M + 1;
  const int tiles_n = (operands.n() - 1) / Config::BLOCK_N + 1;
  const int width = Config::GROUP_M * tiles_n;
  const int first = block / width * Config::GROUP_M;
  const int rows = min(tiles_m - first, Config::GROUP_M);
  return {(first + block % width % rows) * Config::BLOCK_M, block % width / rows * Config::BLOCK_N};
}

// What one thread copies in every step: one chunk of K in each of these rows. Null: no such row, zeros instead.
template <class Config>
struct CopyRows {
  using Element = typename Config::Element;
  const Element* a[Config::A_COPIES];
  const Element* b[Config::B_COPIES];
};

template <class Config, class Operands>
__device__ __forceinline__ CopyRows<Config> copy_rows(const Operands& operands, TileOrigin origin) {
  CopyRows<Config> rows;
  const int row = ptx::thread_index() / Config::ROW_CHUNKS;
#pragma unroll
  for (int i = 0; i < Config::A_COPIES; ++i) rows.a[i] = operands.a(origin.m + row + i * Config::COPY_ROWS);
#pragma unroll
  for (int i = 0; i < Config::B_COPIES; ++i) rows.b[i] = operands.b(origin.n + row + i * Config::COPY_ROWS);
  return rows;
}

// Main loop

// CHUNK elements of one row from column k on; zeros beyond the row's end and where there is no row. An unaligned row
// is read element by element: it may begin anywhere.
template <class Config>
__device__ __forceinline__ void copy_chunk(ptx::SharedAddress to, const typename Config::Element* row, const void* any,
                                           int k, int size) {
  if constexpr (Config::ALIGNED) {
    const bool valid = row != nullptr && k < size;
    ptx::copy_async(to, valid ? static_cast<const void*>(row + k) : any, valid ? 16 : 0);
  } else {
    union {
      ptx::Chunk chunk;
      typename Config::Element element[Config::CHUNK];
    } out;
    out.chunk = {};
#pragma unroll
    for (int e = 0; e < Config::CHUNK; ++e)
      if (row != nullptr && k + e < size) out.element[e] = row[k + e];
    ptx::store_shared(to, out.chunk);
  }
}

// Step of K into its slot of the ring, and one group of copies whether or not there is such a step.
template <class Config, class Operands>
__device__ __forceinline__ void load_step(const Operands& operands, const CopyRows<Config>& rows, int step, int steps) {
  if (step < steps) {
    const int chunk = ptx::thread_index() % Config::ROW_CHUNKS, row = ptx::thread_index() / Config::ROW_CHUNKS;
    const int k = step * Config::BLOCK_K + chunk * Config::CHUNK;
    const ptx::SharedAddress slot = step % Config::STAGES * Config::STAGE_BYTES + operand_chunk(row, chunk);
#pragma unroll
    for (int i = 0; i < Config::A_COPIES; ++i)
      copy_chunk<Config>(slot + i * Config::COPY_ROWS * Config::ROW_BYTES, rows.a[i], operands.any(), k, operands.k());
#pragma unroll
    for (int i = 0; i < Config::B_COPIES; ++i)
      copy_chunk<Config>(slot + (Config::BLOCK_M + i * Config::COPY_ROWS) * Config::ROW_BYTES, rows.b[i],
                         operands.any(), k, operands.k());
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
  const int a_row = warp / Config::WARPS_N * Config::WARP_M + lane % 16;
  const int b_row = warp % Config::WARPS_N * Config::WARP_N + lane % 8 + lane / 16 * 8;
  const ptx::SharedAddress a_slot = step % Config::STAGES * Config::STAGE_BYTES;
  const ptx::SharedAddress b_slot = a_slot + Config::BLOCK_M * Config::ROW_BYTES;
#pragma unroll
  for (int chunk = 0; chunk < Config::ROW_CHUNKS; chunk += Config::MMA_CHUNKS) {
    unsigned a[Config::FRAGMENTS_M][4], b[Config::FRAGMENTS_N / 2][4];
#pragma unroll
    for (int i = 0; i < Config::FRAGMENTS_M; ++i) {
      ptx::load_matrices(a[i], a_slot + operand_chunk(a_row + i * Config::MMA_M, chunk + lane / 16));
      centre_operand<typename Config::Element>(a[i]);
    }
#pragma unroll
    for (int j = 0; j < Config::FRAGMENTS_N / 2; ++j) {
      ptx::load_matrices(b[j], b_slot + operand_chunk(b_row + j * 2 * Config::MMA_N, chunk + lane / 8 % 2));
      centre_operand<typename Config::Element>(b[j]);
    }
#pragma unroll
    for (int i = 0; i < Config::FRAGMENTS_M; ++i)
#pragma unroll
      for (int j = 0; j < Config::FRAGMENTS_N; ++j)
        ptx::multiply_add(acc[i][j], a[i], b[j / 2] + j % 2 * 2, typename Config::Element{});
  }
}

// meanwhile(): called while the first copies are under way; barriers lie between it and the end.
template <class Config, class Operands, class Meanwhile>
__device__ __forceinline__ void main_loop(Accumulators<Config>& acc, const Operands& operands, TileOrigin origin,
                                          const Meanwhile& meanwhile) {
  const CopyRows<Config> rows = copy_rows<Config>(operands, origin);
  const int steps = (operands.k() - 1) / Config::BLOCK_K + 1;
#pragma unroll
  for (int step = 0; step < Config::STAGES - 1; ++step) load_step<Config>(operands, rows, step, steps);
  meanwhile();
  for (int step = 0; step < steps; ++step) {
    ptx::wait_copies<Config::STAGES - 2>();
    // One barrier serves both ends: this step has arrived for all, and nobody reads the slot that is filled next.
    ptx::sync_threads();
    load_step<Config>(operands, rows, step + Config::STAGES - 1, steps);
    multiply_step<Config>(acc, step);
  }
}

// Accumulators -> finished tile, in the ring's place. finish(column) gives a function that makes what is stored of the
// accumulators of that column and the next. Begins with a barrier, since other warps may still be reading the ring; no
// copy is under way: the last step waited for the last copies, and the groups after it are empty.
template <class Config, class Finish>
__device__ __forceinline__ void stage_result(const Accumulators<Config>& acc, const Finish& finish) {
  ptx::sync_threads();
  const int lane = ptx::thread_index() % 32, warp = ptx::thread_index() / 32;
  const int row0 = warp / Config::WARPS_N * Config::WARP_M + lane / 4;
  const int column0 = warp % Config::WARPS_N * Config::WARP_N + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < Config::FRAGMENTS_N; ++j) {
    const int column = column0 + j * Config::MMA_N;
    const auto finish_pair = finish(column);
#pragma unroll
    for (int i = 0; i < Config::FRAGMENTS_M; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::store_shared(result_element<Config>(row0 + i * Config::MMA_M + half * 8, column),
                          finish_pair(acc[i][j][2 * half], acc[i][j][2 * half + 1]));
  }
  ptx::sync_threads();
}

}  // namespace inception_fused
