// K1 as its callers see it: one problem as plain data, and the launch. No CUDA, no Torch.
//
//     y[:, 0 : k[0]]       = act(x @ w[0]^T * scale[0] + shift[0])      branch 1, its slice of the output
//     r[:, 0 : k[1]]       = act(x @ w[1]^T * scale[1] + shift[1])      reduction of the 3x3 branch
//     r[:, r5 : r5 + k[2]] = act(x @ w[2]^T * scale[2] + shift[2])      reduction of the 5x5 branch
#pragma once

#include <vector>

#include "elements.h"
#include "tile.h"

namespace inception_fused {

constexpr int kGroups = 3;

// Type of the scale and shift vectors; the values are those of the Python binding.
enum class VectorType : int { none, fp32, fp16, bf16, fp64 };

struct GroupedGemm {
  const void* x;               // [m, c], row stride x_stride
  const void* w[kGroups];      // [k[g], c], dense
  void* y;                     // [m, >= k[0]], row stride y_stride
  void* r;                     // [m, >= r5 + k[2]], row stride r_stride
  unsigned char* bits;         // [m, ceil(k[0] / 8)], row stride bits_stride, or null: where y is not <= 0
  const void* shift[kGroups];  // [k[g]] of shift_type; not read where that is none
  const void* scale[kGroups];  // [k[g]] of scale_type; not read where that is none
  VectorType shift_type;
  VectorType scale_type;
  long long x_stride, y_stride, r_stride, bits_stride;  // elements from one row to the next
  int m, c, k[kGroups], r5;                             // GEMM_M, GEMM_K, parts of GEMM_N; first column of group 2 in r
  int relu;                                             // whether the activation is ReLU (else none)
};

// Enqueues one launch. Element: bf16, fp16 or tf32. m = 0 launches nothing.
// Throws std::invalid_argument where the problem contradicts the tile or itself, std::runtime_error where CUDA refuses.
template <class Element>
void grouped_gemm(const GroupedGemm& problem, const Tile& tile, const Target& target);

// Every tile that grouped_gemm accepts.
template <class Element>
std::vector<TileFacts> grouped_gemm_tiles();

// Throws std::runtime_error where the kernels of this build cannot be loaded on a device.
template <class Element>
void probe_grouped_gemm(int device);

}  // namespace inception_fused
