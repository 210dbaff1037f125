// What the launch of every GEMM here is given beside its problem, and what is known of its tiles. No CUDA, no Torch.
#pragma once

namespace inception_fused {

// A tile of a kernel's table. aligned: whatever the kernel reads or writes in chunks of 16 bytes lies on 16 bytes, and
// every size and stride that counts its elements is a multiple of 16 bytes; it must be true where it is said.
struct Tile {
  int block_m, block_n;
  bool aligned;
};

// A tile of the table, with what one block of it takes.
struct TileFacts {
  Tile tile;
  int threads, shared_bytes;
};

struct Target {
  int device;    // CUDA's index; current before and after the call may be another
  void* stream;  // cudaStream_t of that device
};

}  // namespace inception_fused
