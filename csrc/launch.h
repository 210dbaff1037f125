// Launches for every kernel of the extension: current device, errors in words, shared memory beyond 48 KB.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

namespace inception_fused {

// Throws std::runtime_error that says what was tried and what CUDA answered. what(): a string, made only on failure.
template <class What>
void check(cudaError_t error, const What& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next caller of this runtime would be told of it
  std::string text = what() + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  switch (error) {
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
      text += "; it needs an NVIDIA GPU and a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) +
              " or newer, which nvidia-smi shows";
      break;
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      text += "; this build has no code for the device: reinstall on the machine that has it";
      break;
    default:
      break;
  }
  throw std::runtime_error(text);
}

// Makes a device current, and the one before it again at the end.
class CurrentDevice {
 public:
  template <class What>
  CurrentDevice(int device, const What& what) : device_(device) {
    check(cudaGetDevice(&before_), what);
    if (before_ != device_) check(cudaSetDevice(device_), what);
  }
  ~CurrentDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int device_, before_ = 0;
};

// A kernel whose one argument is its problem, ready to be launched on any device.
template <class Problem>
class Kernel {
 public:
  using Function = void (*)(Problem);

  constexpr Kernel(Function function, unsigned threads, unsigned shared_bytes)
      : function_(function), threads_(threads), shared_bytes_(shared_bytes) {}

  // Loads the code and allows the shared memory; once for each device, since the setting is the device's.
  template <class What>
  void prepare(int device, const What& what) {
    const unsigned long long bit = device < 64 ? 1ull << device : 0;
    if ((ready_.load(std::memory_order_acquire) & bit) != 0) return;
    check(cudaFuncSetAttribute(function_, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes_)),
          what);
    ready_.fetch_or(bit, std::memory_order_release);
  }

  template <class What>
  void launch(const Problem& problem, unsigned blocks, int device, void* stream, const What& what) {
    prepare(device, what);
    void* arguments[] = {const_cast<Problem*>(&problem)};
    check(cudaLaunchKernel(function_, dim3(blocks), dim3(threads_), arguments, shared_bytes_,
                           static_cast<cudaStream_t>(stream)),
          what);
  }

 private:
  Function function_;
  unsigned threads_, shared_bytes_;
  std::atomic<unsigned long long> ready_{0};
};

}  // namespace inception_fused
