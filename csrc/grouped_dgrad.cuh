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
// belongs here: 61% of them with taps at random (1 - (8/9)**8; 38% for the four channels of tf32). All of these are
// under way at once, and the taps of a thread's next chunk with them, or each of its 4 to 32 chunks would wait for
// memory twice. That this beats reading all nine chunks without looking is a guess.
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

  static_assert(BLOCK_M <= Base::THREADS, "a thread finds the senders of one row");
  static_assert(PARTS % Base::THREADS == 0, "every thread has as many parts");
  static_assert(Base::CHUNK == 8 || Base::CHUNK == 4, "the taps of a part are half a word or a word");
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
  const int row = ptx::thread_index();
  if (row < Config::BLOCK_M)
    ptx::store_shared(Config::SENDERS + row * sizeof(unsigned), m0 + row < p.m ? find_senders(p, m0 + row) : 0u);
}

// Epilogue

// 16 bytes of dx: CHUNK channels of one pixel.
struct Part {
  int row, column;  // in the tile
  long long m;      // row and first column of dx
  int n;
};

template <class Config>
__device__ __forceinline__ Part part_of(TileOrigin origin, int i) {
  const int row = i / Config::ROW_PARTS, column = i % Config::ROW_PARTS * Config::CHUNK;
  return {row, column, origin.m + row, origin.n + column};
}

// The pixel whose window has pixel m at a tap, in rows of dx.
__device__ __forceinline__ long long sender(const GroupedDgrad& p, long long m, int tap) {
  return m + (1 - tap / 3) * p.width + (1 - tap % 3);
}

// The taps of CHUNK channels, of which there are so many, in four bits each. What is no channel has no tap.
template <class Config>
__device__ __forceinline__ unsigned load_taps(const unsigned char* from, int channels) {
  if constexpr (Config::ALIGNED && Config::CHUNK == 8) return *reinterpret_cast<const unsigned*>(from);
  if constexpr (Config::ALIGNED && Config::CHUNK == 4) return *reinterpret_cast<const unsigned short*>(from);
  unsigned taps = channels < 8 ? ~0u << 4 * channels : 0u;
#pragma unroll
  for (int byte = 0; byte < Config::CHUNK / 2; ++byte)
    if (2 * byte < channels) taps |= static_cast<unsigned>(from[byte]) << 8 * byte;
  return taps;
}

// The taps of a part in its nine senders; of a pixel that is none, taps that match nothing.
template <class Config>
__device__ __forceinline__ void load_senders(unsigned (&taps)[kTaps], const GroupedDgrad& p, const Part& part) {
  const unsigned senders =
      part.n < p.c ? ptx::load_shared<unsigned>(Config::SENDERS + part.row * sizeof(unsigned)) : 0u;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    taps[tap] = ~0u;
    if (senders >> tap & 1)
      taps[tap] = load_taps<Config>(p.taps + sender(p, part.m, tap) * p.taps_stride + part.n / 2, p.c - part.n);
  }
}

// Bit 4 * e + 3: whether channel e has this tap. A nibble's lower three bits carry into the fourth unless all are 0.
template <class Config>
__device__ __forceinline__ unsigned find_matches(unsigned taps, int tap) {
  const unsigned differs = taps ^ tap * 0x11111111u;
  return ~(((differs & 0x77777777u) + 0x77777777u) | differs) & (Config::CHUNK == 8 ? 0x88888888u : 0x8888u);
}

__device__ __forceinline__ bool has_channel(unsigned matches, int e) { return (matches >> (4 * e + 3) & 1) != 0; }

template <class Config>
union Channels {
  ptx::Chunk chunk;
  typename Config::Element element[Config::CHUNK];
};

// The channels of dpool that match; others are not to be looked at.
template <class Config>
__device__ __forceinline__ ptx::Chunk load_dpool(const typename Config::Element* from, unsigned matches) {
  Channels<Config> out;
  out.chunk = {};
  if constexpr (Config::ALIGNED) {
    if (matches != 0) out.chunk = *reinterpret_cast<const ptx::Chunk*>(from);
  } else {
#pragma unroll
    for (int e = 0; e < Config::CHUNK; ++e)
      if (has_channel(matches, e)) out.element[e] = from[e];
  }
  return out.chunk;
}

template <class Config>
__device__ __forceinline__ void store_dx(typename Config::Element* to, const float (&sum)[Config::CHUNK],
                                         int channels) {
  using Element = typename Config::Element;
  union {
    ptx::Chunk chunk;
    decltype(ptx::round_pair(0.0f, 0.0f, Element{})) pair[Config::CHUNK / 2];
    Element element[Config::CHUNK];
  } out;
#pragma unroll
  for (int e = 0; e < Config::CHUNK; e += 2) out.pair[e / 2] = ptx::round_pair(sum[e], sum[e + 1], Element{});
  if constexpr (Config::ALIGNED) {
    *reinterpret_cast<ptx::Chunk*>(to) = out.chunk;
  } else {
#pragma unroll
    for (int e = 0; e < Config::CHUNK; ++e)
      if (e < channels) to[e] = out.element[e];
  }
}

// Staged sums and what the senders have -> dx.
template <class Config>
__device__ __forceinline__ void store_result(const GroupedDgrad& p, TileOrigin origin) {
  using Element = typename Config::Element;
  const auto* dpool = static_cast<const Element*>(p.dpool);
  auto* dx = static_cast<Element*>(p.dx);
  unsigned taps[kTaps];
  if constexpr (Config::ALIGNED) load_senders<Config>(taps, p, part_of<Config>(origin, ptx::thread_index()));
#pragma unroll 1
  for (int i = ptx::thread_index(); i < Config::PARTS; i += Config::THREADS) {
    const Part part = part_of<Config>(origin, i);
    if (part.m >= p.m) break;
    // Single elements of two parts at once spilled 8 bytes on sm_100 and sm_120.
    if constexpr (!Config::ALIGNED) load_senders<Config>(taps, p, part);
    unsigned matches[kTaps];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) matches[tap] = find_matches<Config>(taps[tap], tap);
    // Before dpool is asked for: after it the compiler moves these loads to the loop's end, where they are waited for.
    if (Config::ALIGNED && i + Config::THREADS < Config::PARTS)
      load_senders<Config>(taps, p, part_of<Config>(origin, i + Config::THREADS));
    Channels<Config> sent[kTaps];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
      sent[tap].chunk = load_dpool<Config>(dpool + sender(p, part.m, tap) * p.dpool_stride + part.n, matches[tap]);
    float sum[Config::CHUNK];
#pragma unroll
    for (int e = 0; e < Config::CHUNK; e += Config::RESULT_CHUNK) {
      const auto staged = ptx::load_shared<ptx::Chunk>(result_element<Config>(part.row, part.column + e));
#pragma unroll
      for (int word = 0; word < Config::RESULT_CHUNK; ++word) sum[e + word] = ptx::as_float(staged.word[word]);
    }
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
      for (int e = 0; e < Config::CHUNK; ++e)
        if (has_channel(matches[tap], e)) sum[e] += ptx::to_float(sent[tap].element[e]);
    if (part.n < p.c) store_dx<Config>(dx + part.m * p.dx_stride + part.n, sum, p.c - part.n);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::THREADS) grouped_dgrad_kernel(const __grid_constant__ GroupedDgrad p) {
  const DgradOperands<typename Config::Element> operands{p};
  const TileOrigin origin = tile_origin<Config>(operands, ptx::block_index());
  Accumulators<Config> acc = {};
  main_loop<Config>(acc, operands, origin, [&] { store_senders<Config>(p, origin.m); });
  stage_result<Config>(acc, [](int) { return [](float first, float second) { return ptx::Pair{first, second}; }; });
  store_result<Config>(p, origin);
}

}  // namespace inception_fused
