// K1 on sm_80 and up: the three 1x1 reductions of a block as one grouped GEMM. Device code only.
//
//     out[m, n] = act(sum_k x[m, k] * w[n, k] * scale[n] + shift[n])        n over the columns of all three groups
//
// Shapes:  as in grouped_gemm.h; the groups' columns lie end to end, n in [0, k[0] + k[1] + k[2]).
// GEMM:    GEMM_M = m = N*H*W, GEMM_N = k[0] + k[1] + k[2], GEMM_K = c; a = x, b = w.
//
// A tile of columns may straddle groups, so groups of 16, 24 or 32 columns waste nothing but the last tile's rest.
// The tile itself is gemm_tile.cuh's.
#pragma once

#include "gemm_tile.cuh"
#include "grouped_gemm.h"

namespace inception_fused {

template <class Element, int BLOCK_M, int BLOCK_N, bool ALIGNED>
struct GroupedGemmConfig : GemmTile<Element, BLOCK_M, BLOCK_N, ALIGNED, Element> {
  using Base = GemmTile<Element, BLOCK_M, BLOCK_N, ALIGNED, Element>;
  static constexpr int AFFINE = Base::TILE_BYTES;  // scale, shift: 2 x BLOCK_N
  static constexpr int SHARED_BYTES = AFFINE + 2 * BLOCK_N * static_cast<int>(sizeof(float));

  static_assert(BLOCK_N % 8 == 0, "a byte of mask bits lies in one tile");
  static_assert(SHARED_BYTES <= kSharedLimit, "a block has to fit every architecture");
};

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

// Operands

template <class Element>
struct GroupedOperands {
  const GroupedGemm& p;

  __device__ int m() const { return p.m; }
  __device__ int n() const { return p.k[0] + p.k[1] + p.k[2]; }
  __device__ int k() const { return p.c; }
  __device__ const void* any() const { return p.x; }

  __device__ const Element* a(int m) const {
    return m < p.m ? static_cast<const Element*>(p.x) + m * p.x_stride : nullptr;
  }

  __device__ const Element* b(int n) const {
    const Column column = find_column(p, n);
    const auto* w = static_cast<const Element*>(choose(p.w, column.group));
    return column.group < kGroups ? w + static_cast<long long>(column.index) * p.c : nullptr;
  }
};

// Prologue: scale and shift

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

// What stage_result stores of two neighbouring columns.
template <class Config>
struct AffineRelu {
  bool relu;

  __device__ auto operator()(int column) const {
    const auto scale = ptx::load_shared<ptx::Pair>(Config::AFFINE + column * sizeof(float));
    const auto shift = ptx::load_shared<ptx::Pair>(Config::AFFINE + (Config::BLOCK_N + column) * sizeof(float));
    return [=, relu = relu](float first, float second) {
      return ptx::round_pair(affine_relu(first, scale.first, shift.first, relu),
                             affine_relu(second, scale.second, shift.second, relu), typename Config::Element{});
    };
  }
};

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
  const GroupedOperands<typename Config::Element> operands{p};
  const TileOrigin origin = tile_origin<Config>(operands, ptx::block_index());
  Accumulators<Config> acc = {};
  main_loop<Config>(acc, operands, origin, [&] { load_affine<Config>(p, origin.n); });
  stage_result<Config>(acc, AffineRelu<Config>{p.relu != 0});
  store_result<Config>(p, origin);
}

}  // namespace inception_fused
