// The part of CUDA's runtime that the launchers call, on simulated devices. Every call that a test may want to see is
// recorded; a launch runs the kernel before it returns, one block after another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace sim {
cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   const std::function<void()>& body);
}  // namespace sim

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);

template <class Argument>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Argument), cudaFuncAttribute, int bytes) {
  return sim::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments,
                             std::size_t shared_bytes, cudaStream_t stream) {
  const Argument argument = *static_cast<const Argument*>(arguments[0]);
  return sim::launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream,
                     [kernel, argument] { kernel(argument); });
}
