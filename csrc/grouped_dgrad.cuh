// The gradient to a block's input on sm_80 and up: the three 1x1 reductions and the max-pool in one. Device code only.
//
//     dx[q, c] = sum_k g[q, k] * w[c, k]  +  sum over t = 3 * r + s of dpool[p, c] where taps[p, c] = t
//
// Shapes:  as in grouped_dgrad.h; p is the pixel of q's image whose window has q at (r, s).
// GEMM:    GEMM_M = m = N*H*W, GEMM_N = c, GEMM_K = k, the gradients of three convolutions end to end; a = g, b = w.
//
// The sums over k are staged in fp32, then a thread takes 16 bytes of a row of dx at a time and gathers what up to nine
// pixels sent there. Gathered, not scattered: no atomics, and the nine taps are added in one order, in fp32, rounded
// once with the sum over k. Taps are read before dpool, so that of dpool only chunks are read in which some channel
// belongs here: 61% of them with taps at random (1 - (8/9)**8; 38% for the four channels of tf32). That this beats
// reading all nine at once is a guess. The taps of a thread's next chunk are on their way while this one is summed,
// or each of its 4 to 32 chunks would wait for memory twice.
#pragma once

#include "gemm_tile.cuh"
#include "grouped_dgrad.h"

namespace inception_fused {

constexpr int kTaps = 9;

template <class Element, int BLOCK_M, int BLOCK_N, bool ALIGNED>
struct GroupedDgradConfig : GemmTile<Element, BLOCK_M, BLOCK_N, ALIGNED, float> {
  using Base = GemmTile<Element, BLOCK_M, BLOCK_N, ALIGNED, float>;
  static constexpr int ROW_PARTS = BLOCK_N / Base::CHUNK, PARTS = BLOCK_M * ROW_PARTS;  // parts: 16 bytes of dx
  static constexpr int SENDERS = Base::TILE_BYTES;                                      // BLOCK_M words
  static constexpr int SHARED_BYTES = SENDERS + BLOCK_M * static_cast<int>(sizeof(unsigned));

  static_assert(PARTS % Base::THREADS == 0, "every thread has as many parts");
  static_assert(Base::CHUNK % 2 == 0, "a part begins with a byte of taps");
  static_assert(SHARED_BYTES <= kSharedLimit, "a block has to fit every architecture");
};

template <class Element>
struct DgradOperands {
  const GroupedDgrad& p;

  __device__ int m() const { return p.m; }
  __device__ int n() const { return p.c; }
  __device__ int k() const { return p.k; }
  __device__ const void* any() const { return p.g; }

  __device__ const Element* a(int m) const {
    return m < p.m ? static_cast<const Element*>(p.g) + m * p.g_stride : nullptr;
  }

  __device__ const Element* b(int n) const {
    return n < p.c ? static_cast<const Element*>(p.w) + static_cast<long long>(n) * p.k : nullptr;
  }
};

// Prologue: who may have sent something

// Bit 3 * r + s: whether the window that has pixel m at (r, s) is one of m's image.
__device__ __forceinline__ unsigned find_senders(const GroupedDgrad& p, int m) {
  const int h = m / p.width % p.height, w = m % p.width;
  const unsigned rows = (h + 1 < p.height ? 0007u : 0u) | 0070u | (h > 0 ? 0700u : 0u);
  const unsigned columns = (w + 1 < p.width ? 0111u : 0u) | 0222u | (w > 0 ? 0444u : 0u);
  return rows & columns;
}

// Once for each row of the tile, since two divisions for each part would cost as much as its sums.
template <class Config>
__device__ __forceinline__ void store_senders(const GroupedDgrad& p, int m0) {
  for (int row = ptx::thread_index(); row < Config::BLOCK_M; row += Config::THREADS)
    ptx::store_shared(Config::SENDERS + row * sizeof(unsigned), m0 + row < p.m ? find_senders(p, m0 + row) : 0u);
}

// Epilogue

// Where part i of the tile is in dx.
struct Part {
  int row, n;  // in the tile; in dx
};

template <class Config>
__device__ __forceinline__ Part part_of(TileOrigin origin, int i) {
  return {i / Config::ROW_PARTS, origin.n + i % Config::ROW_PARTS * Config::CHUNK};
}

// Pixels from the one that a window has at tap t to the window's own, rows and columns of the image.
__device__ __forceinline__ long long sender_rows(int tap) { return 1 - tap / 3; }
__device__ __forceinline__ long long sender_columns(int tap) { return 1 - tap % 3; }
