// Everything that a kernel asks of the machine: indices, shared memory, asynchronous copies, matrix instructions,
// conversions. The only file with inline PTX. Kernels reach the hardware through these names alone, so that a host
// can supply the same names (tests/csrc/sim/machine.h does) and run the very same kernel text.
//
// Instructions as in the PTX ISA 8.0, sm_80 and up. Shared memory is addressed by byte offsets into the block's
// dynamic allocation, which begins on at least 128 bytes.
#ifndef INCEPTION_FUSED_PTX_CUH
#define INCEPTION_FUSED_PTX_CUH

#include "elements.h"

namespace inception_fused::ptx {

using SharedAddress = unsigned;

// Sixteen bytes, the widest load and store of one thread.
struct alignas(16) Chunk {
  unsigned word[4];
};

struct alignas(8) Pair {
  float first, second;
};

extern __shared__ __align__(128) unsigned char shared_memory[];

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_index() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ void sync_threads() { __syncthreads(); }

template <class T>
__device__ __forceinline__ T load_shared(SharedAddress from) {
  return *reinterpret_cast<const T*>(shared_memory + from);
}

template <class T>
__device__ __forceinline__ void store_shared(SharedAddress to, const T& value) {
  *reinterpret_cast<T*>(shared_memory + to) = value;
}

__device__ __forceinline__ unsigned hardware_address(SharedAddress offset) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared_memory)) + offset;
}

// Copies 16 bytes past the registers; bytes (0 or 16) of them are read, the rest is zero.
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(hardware_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

// Closes this thread's current group of copies; an empty group counts.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most PENDING of this thread's newest groups are still under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit ones). Lane i gives the address of row i % 8 of matrix i / 8;
// lane i gets the four bytes at 4 * (i % 4) of row i / 4 of each.
__device__ __forceinline__ void load_matrices(unsigned (&out)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(hardware_address(row))
               : "memory");
}

// acc [16, 8] += a [16, 32 bytes] @ b [32 bytes, 8], in fp32. Lane i holds of acc the rows i / 4 and i / 4 + 8 at
// columns 2 * (i % 4) and the next; of a and b what load_matrices gives. TF32 ignores the 13 low bits of an operand.
#define INCEPTION_FUSED_MMA(ELEMENT, SHAPE_AND_TYPES)                                                                 \
  __device__ __forceinline__ void multiply_add(float (&acc)[4], const unsigned (&a)[4], const unsigned* b, ELEMENT) { \
    asm volatile("mma.sync.aligned." SHAPE_AND_TYPES                                                                  \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"                                 \
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                 \
  }
INCEPTION_FUSED_MMA(bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
INCEPTION_FUSED_MMA(fp16, "m16n8k16.row.col.f32.f16.f16.f32")
INCEPTION_FUSED_MMA(tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef INCEPTION_FUSED_MMA

// Two neighbouring elements as stored, rounded to nearest even; NaN stays NaN.
__device__ __forceinline__ unsigned round_pair(float first, float second, bf16) {
  unsigned out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(second), "f"(first));
  return out;
}

__device__ __forceinline__ unsigned round_pair(float first, float second, fp16) {
  unsigned out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(second), "f"(first));
  return out;
}

__device__ __forceinline__ Pair round_pair(float first, float second, tf32) { return {first, second}; }

__device__ __forceinline__ float as_float(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned as_bits(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float to_float(bf16 value) { return as_float(static_cast<unsigned>(value.bits) << 16); }

__device__ __forceinline__ float to_float(fp16 value) {
  float out;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(out) : "h"(value.bits));
  return out;
}

__device__ __forceinline__ float to_float(tf32 value) { return value.value; }

}  // namespace inception_fused::ptx

#endif  // INCEPTION_FUSED_PTX_CUH
