// The gradient to a block's input as its callers see it: one problem as plain data, and the launch. No CUDA, no Torch.
//
//     dx[q, c] = sum_k g[q, k] * w[c, k]  +  sum over t = 3 * r + s of dpool[p, c] where taps[p, c] = t
//
// p is the pixel of q's image whose window has q at (r, s): p = (hq - (r - 1), wq - (s - 1)).
#pragma once

#include <vector>

#include "elements.h"
#include "tile.h"

namespace inception_fused {

struct GroupedDgrad {
  const void* g;              // [m, k], row stride g_stride: gradients to the 1x1 convolutions' outputs, side by side
  const void* w;              // [c, k], dense: their weights, transposed
  const void* dpool;          // [m, c], row stride dpool_stride: gradient to the max-pool's output
  const unsigned char* taps;  // [m, ceil(c / 2)], row stride taps_stride: each window's arg-max in four bits, the even
                              // channel's in the low half; of an odd c the last high half is not used
  void* dx;                   // [m, c], row stride dx_stride; overlaps nothing else
  long long g_stride, dpool_stride, taps_stride, dx_stride;  // elements from one row to the next
  int m, k, c, height, width;                                // GEMM_M = N * height * width, GEMM_K, GEMM_N
};

// Enqueues one launch. Element: bf16, fp16 or tf32. m = 0 launches nothing. An aligned tile also wants the taps of a
// chunk of 16 bytes in one load: address and taps_stride are multiples of 4 bytes (of 2 in tf32).
// Throws std::invalid_argument where the problem contradicts the tile or itself, std::runtime_error where CUDA refuses.
template <class Element>
void grouped_dgrad(const GroupedDgrad& problem, const Tile& tile, const Target& target);

// Every tile that grouped_dgrad accepts.
template <class Element>
std::vector<TileFacts> grouped_dgrad_tiles();

// Throws std::runtime_error where the kernels of this build cannot be loaded on a device.
template <class Element>
void probe_grouped_dgrad(int device);

}  // namespace inception_fused
