// Simulated devices: current device of each thread, limits, the record of calls, and the tests' controls over it all.
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

#include "block.h"
#include "cuda_runtime.h"

namespace sim {
namespace {

constexpr std::size_t DEFAULT_SHARED = 48 << 10;  // what a kernel may use without asking
constexpr int MAX_SHARED = 99 << 10;              // sm_86, sm_89, sm_120

struct State {
  std::mutex mutex;
  Timing timing = Timing::lazy;
  unsigned long long seed = 0;
  int devices = 1;
  cudaError_t refusal = cudaSuccess;
  std::map<std::pair<int, const void*>, int> allowed;
  std::ostringstream record;
  std::string failure, text;
};

State& state() {
  static State the_state;
  return the_state;
}

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t available() {
  if (state().refusal != cudaSuccess) return state().refusal;
  return state().devices == 0 ? cudaErrorNoDevice : cudaSuccess;
}

void note(const std::string& call) { state().record << call << "\n"; }

std::string address(const void* pointer) { return std::to_string(reinterpret_cast<std::uintptr_t>(pointer)); }

std::size_t this_thread() { return std::hash<std::thread::id>{}(std::this_thread::get_id()); }

}  // namespace

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (available() != cudaSuccess) return answer(available());
  if (bytes > MAX_SHARED) return answer(cudaErrorInvalidValue);
  const std::lock_guard lock(state().mutex);
  state().allowed[{current_device, kernel}] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   const std::function<void()>& body) {
  if (available() != cudaSuccess) return answer(available());
  const std::lock_guard lock(state().mutex);
  std::ostringstream call;
  call << "launch device=" << current_device << " stream=" << address(stream) << " thread=" << this_thread()
       << " blocks=" << grid.x << " threads=" << block.x << " shared=" << shared_bytes;
  note(call.str());
  const auto allowed = state().allowed.find({current_device, kernel});
  const std::size_t limit = allowed == state().allowed.end() ? DEFAULT_SHARED : allowed->second;
  if (shared_bytes > limit) return answer(cudaErrorInvalidValue);
  Block simulated(state().timing, state().seed);
  try {
    for (unsigned index = 0; index < grid.x; ++index)
      simulated.run(static_cast<int>(index), static_cast<int>(block.x), shared_bytes, body);
  } catch (const Fault& error) {
    state().failure = error.what();
    return answer(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

}  // namespace sim

cudaError_t cudaGetDevice(int* device) {
  *device = sim::current_device;
  return sim::answer(sim::available());
}

cudaError_t cudaSetDevice(int device) {
  if (sim::available() != cudaSuccess) return sim::answer(sim::available());
  if (device < 0 || device >= sim::state().devices) return sim::answer(cudaErrorInvalidDevice);
  sim::current_device = device;
  sim::note("set_device device=" + std::to_string(device));
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(sim::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return sim::state().failure.c_str();
  return "simulated refusal";
}

const char* cudaGetErrorName(cudaError_t error) {
  sim::state().text = "cudaError " + std::to_string(static_cast<int>(error));
  return sim::state().text.c_str();
}

extern "C" {

// timing: 0 lazy, 1 eager, 2 random. devices: how many there are. refusal: what every call answers, or 0.
__attribute__((visibility("default"))) void sim_configure(int timing, unsigned long long seed, int devices,
                                                          int refusal) {
  sim::state().timing = static_cast<sim::Timing>(timing);
  sim::state().seed = seed;
  sim::state().devices = devices;
  sim::state().refusal = static_cast<cudaError_t>(refusal);
}

// From now on copies may read these bytes too, and none but such; size 0 forgets them all.
__attribute__((visibility("default"))) void sim_allow(const void* first, unsigned long long size) {
  if (size == 0) return sim::allowed_ranges().clear();
  sim::allowed_ranges().push_back({static_cast<const unsigned char*>(first), size});
}

// The calls since the last reading, one a line. The text is valid until the next call.
__attribute__((visibility("default"))) const char* sim_record() {
  sim::state().text = sim::state().record.str();
  sim::state().record.str("");
  return sim::state().text.c_str();
}

// Makes a device current in the calling thread, as the code around a launch may have done.
__attribute__((visibility("default"))) void sim_set_device(int device) { sim::current_device = device; }

// The error that the next caller of the runtime in this thread would be told of, which this clears.
__attribute__((visibility("default"))) int sim_last_error() { return cudaGetLastError(); }

__attribute__((visibility("default"))) int sim_get_device() { return sim::current_device; }
}
