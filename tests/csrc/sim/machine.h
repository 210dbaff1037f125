// The names of csrc/ptx.cuh, carried out by the simulator. Included before every source, so that ptx.cuh itself is
// skipped and the kernels compile unchanged for the host.
#pragma once
#define INCEPTION_FUSED_PTX_CUH

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "elements.h"

#define __global__
#define __device__
#define __forceinline__ static inline  // static: changed copies of one function may be linked side by side
#define __launch_bounds__(...)
#define __grid_constant__

using std::min;

namespace inception_fused::ptx {

using sim::Block;
using sim::Where;
using SharedAddress = unsigned;

struct alignas(16) Chunk {
  unsigned word[4];
};

struct alignas(8) Pair {
  float first, second;
};

inline int thread_index() { return Block::current()->thread(); }
inline int block_index() { return Block::current()->index(); }
inline void sync_threads(Where where = Where::current()) { Block::current()->sync_threads(where); }

template <class T>
T load_shared(SharedAddress from, Where where = Where::current()) {
  Block& block = *Block::current();
  block.pause(where);
  T out;
  block.shared().read(&out, from, sizeof(T), block.thread(), where);
  return out;
}

template <class T>
void store_shared(SharedAddress to, const T& value, Where where = Where::current()) {
  Block& block = *Block::current();
  block.pause(where);
  block.shared().write(to, &value, sizeof(T), block.thread(), where);
}

inline void copy_async(SharedAddress to, const void* from, int bytes, Where where = Where::current()) {
  if (bytes != 0 && bytes != 16) sim::fault(where, "a copy reads ", bytes, " bytes, wants 0 or 16");
  if (bytes != 0 && reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
    sim::fault(where, "a copy of 16 bytes from an address that is no multiple of 16");
  Block::current()->copy(to, from, 16, static_cast<unsigned>(bytes), where);
}

inline void commit_copies() { Block::current()->commit(); }

template <int PENDING>
void wait_copies(Where where = Where::current()) {
  Block::current()->wait_copies(PENDING, where);
}

inline void load_matrices(unsigned (&out)[4], SharedAddress row, Where where = Where::current()) {
  struct Arguments {
    unsigned* out;
    SharedAddress row;
  } arguments{out, row};
  Block& block = *Block::current();
  block.collective("ldmatrix", where, arguments, [&](Arguments* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int r = 0; r < 8; ++r) {
        unsigned words[4];
        block.shared().read(words, lanes[matrix * 8 + r]->row, 16, sim::SharedMemory::WARP, where);
        for (int word = 0; word < 4; ++word) lanes[r * 4 + word]->out[matrix] = words[word];
      }
  });
}

inline float as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned as_bits(float value) { return std::bit_cast<unsigned>(value); }

inline float to_float(bf16 value) { return as_float(std::uint32_t{value.bits} << 16); }

// A half's bits, moved to their places in a float, are off by the difference of the exponents' biases, 127 - 15.
inline float to_float(fp16 value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = (value.bits & 0x7fffu) << 13;
  const bool finite = (value.bits & 0x7c00u) != 0x7c00u;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  return std::bit_cast<float>(sign | (finite ? std::bit_cast<std::uint32_t>(scaled) : magnitude | 0x7f800000u));
}

inline float to_float(tf32 value) { return value.value; }

inline unsigned round_pair(float first, float second, bf16) {
  const auto round = [](float value) -> std::uint32_t {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if (value != value) return (bits >> 16 | 0x40) & 0xffff;  // quiet, or the fraction's upper half could be zero
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(first) | round(second) << 16;
}

inline unsigned round_pair(float first, float second, fp16) {
  const auto round = [](float value) -> std::uint32_t {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (value != value) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // from 65520 on infinity is nearest
    // Below 2**-14 the grid is 2**-24 wide: adding 0.5, whose own grid that is, rounds to it.
    if (magnitude < 0x38800000) {
      const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
      return sign | (std::bit_cast<std::uint32_t>(rounded) - std::bit_cast<std::uint32_t>(0.5f));
    }
    return sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  };
  return round(first) | round(second) << 16;
}

inline Pair round_pair(float first, float second, tf32) { return {first, second}; }

// Elements of a 32-bit word of an operand. TF32 drops the 13 low bits, which keeps the poison's NaN a NaN.
inline void operand_elements(unsigned word, double* out, bf16) {
  out[0] = to_float(bf16{static_cast<unsigned short>(word)});
  out[1] = to_float(bf16{static_cast<unsigned short>(word >> 16)});
}

inline void operand_elements(unsigned word, double* out, fp16) {
  out[0] = to_float(fp16{static_cast<unsigned short>(word)});
  out[1] = to_float(fp16{static_cast<unsigned short>(word >> 16)});
}

inline void operand_elements(unsigned word, double* out, tf32) { out[0] = std::bit_cast<float>(word & 0xffffe000u); }

// mma.sync m16n8k16 (bf16, fp16) and m16n8k8 (tf32), row.col: a fragment is words of 4 bytes at row lane / 4, word
// lane % 4 of each 8-row, 16-byte matrix. Products and sums in double, rounded to fp32 once.
template <class Element>
void multiply_add(float (&acc)[4], const unsigned (&a)[4], const unsigned* b, Element, Where where = Where::current()) {
  struct Arguments {
    float* acc;
    const unsigned *a, *b;
  } arguments{acc, a, b};
  Block::current()->collective("mma", where, arguments, [](Arguments* const* lanes) {
    constexpr int PER_WORD = 4 / sizeof(Element), K = 8 * PER_WORD;
    double a_rows[16][K], b_rows[8][K];
    for (int lane = 0; lane < Block::LANES; ++lane) {
      const int row = lane / 4, k = lane % 4 * PER_WORD;
      for (int half = 0; half < 2; ++half) {
        operand_elements(lanes[lane]->a[2 * half], &a_rows[row][k + half * K / 2], Element{});
        operand_elements(lanes[lane]->a[2 * half + 1], &a_rows[row + 8][k + half * K / 2], Element{});
        operand_elements(lanes[lane]->b[half], &b_rows[row][k + half * K / 2], Element{});
      }
    }
    for (int lane = 0; lane < Block::LANES; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = lanes[lane]->acc[i];
        for (int k = 0; k < K; ++k) sum += a_rows[row][k] * b_rows[column][k];
        lanes[lane]->acc[i] = static_cast<float>(sum);
      }
  });
}

}  // namespace inception_fused::ptx
