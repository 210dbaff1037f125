// Refusals in one form: the kernel's name, what it got, what it wants. No CUDA, no Torch.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace inception_fused {

// Throws std::invalid_argument.
struct Refuse {
  const char* kernel;

  [[noreturn]] void operator()(const std::string& what, const std::string& got, const std::string& wants) const {
    throw std::invalid_argument(std::string(kernel) + ": " + what + ": got " + got + ", wants " + wants);
  }

  // A row stride that is smaller than the row.
  void stride(const std::string& name, long long got, const std::string& row, long long least) const {
    if (got < least) (*this)(name, std::to_string(got), "at least " + row + " = " + std::to_string(least));
  }

  // For an aligned tile: sizes that are no multiples of unit, addresses that are none of bytes.
  void unaligned(int unit, std::initializer_list<long long> sizes, int bytes,
                 std::initializer_list<const void*> pointers, const std::string& names) const {
    for (const long long size : sizes)
      if (size % unit != 0) (*this)("an aligned tile", std::to_string(size), "multiples of " + std::to_string(unit));
    for (const void* pointer : pointers)
      if (reinterpret_cast<unsigned long long>(pointer) % bytes != 0)
        (*this)("an aligned tile", "an address that is no multiple of " + std::to_string(bytes),
                names + " on " + std::to_string(bytes) + " bytes");
  }
};

}  // namespace inception_fused
