// The element types of the compiled kernels: storage and name, nothing else. No CUDA, no Torch.
#pragma once

namespace inception_fused {

struct bf16 {
  unsigned short bits;
};

struct fp16 {
  unsigned short bits;
};

// Stored as fp32; the matrix instruction reads sign, exponent and the upper 10 bits of the fraction.
struct tf32 {
  float value;
};

}  // namespace inception_fused
