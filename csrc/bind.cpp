// The extension module inception_fused._native: addresses and sizes in, launches out. No Torch.
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "grouped_dgrad.h"
#include "grouped_gemm.h"
#include "refuse.h"

namespace py = pybind11;

namespace inception_fused {
namespace {

using Address = std::uintptr_t;
using Three = std::array<Address, kGroups>;
using Rows = std::array<Address, 2>;  // address of the first row, elements from one row to the next
using TileList = std::vector<std::array<int, 5>>;

constexpr Refuse refuse_gemm{"grouped_gemm"}, refuse_dgrad{"grouped_dgrad"};

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

int int_of(Address value, const std::string& name) {
  if (value > 0x7fffffff) refuse_gemm(name, std::to_string(value), "under 2**31");
  return static_cast<int>(value);
}

VectorType vector_type(int value, const std::string& name) {
  if (value < 0 || value > static_cast<int>(VectorType::fp64)) refuse_gemm(name, std::to_string(value), "0 to 4");
  return static_cast<VectorType>(value);
}

template <class Visitor>
void with_element(const Refuse& refuse, const std::string& element, const Visitor& visit) {
  if (element == "bf16") return visit(bf16{});
  if (element == "fp16") return visit(fp16{});
  if (element == "tf32") return visit(tf32{});
  refuse("element", "\"" + element + "\"", "bf16, fp16 or tf32");
}

void bind_grouped_gemm(const std::string& element, std::array<int, 2> tile, bool aligned, int device, Address stream,
                       int m, int c, std::array<int, kGroups> k, Rows x, const Three& w, Rows y,
                       std::array<Address, 3> r, Rows bits, const Three& shift, int shift_type, const Three& scale,
                       int scale_type, bool relu) {
  GroupedGemm p{};
  p.x = pointer<const void>(x[0]);
  p.x_stride = static_cast<long long>(x[1]);
  p.y = pointer<void>(y[0]);
  p.y_stride = static_cast<long long>(y[1]);
  p.r = pointer<void>(r[0]);
  p.r_stride = static_cast<long long>(r[1]);
  p.r5 = int_of(r[2], "r5");
  p.bits = pointer<unsigned char>(bits[0]);
  p.bits_stride = static_cast<long long>(bits[1]);
  for (int g = 0; g < kGroups; ++g) {
    p.w[g] = pointer<const void>(w[g]);
    p.shift[g] = pointer<const void>(shift[g]);
    p.scale[g] = pointer<const void>(scale[g]);
    p.k[g] = k[g];
  }
  p.shift_type = vector_type(shift_type, "shift_type");
  p.scale_type = vector_type(scale_type, "scale_type");
  p.m = m;
  p.c = c;
  p.relu = relu;
  const Tile shape{tile[0], tile[1], aligned};
  const Target target{device, pointer<void>(stream)};
  with_element(refuse_gemm, element, [&](auto e) { grouped_gemm<decltype(e)>(p, shape, target); });
}

void bind_grouped_dgrad(const std::string& element, std::array<int, 2> tile, bool aligned, int device, Address stream,
                        int m, int k, int c, std::array<int, 2> image, Rows g, Address w, Rows dpool, Rows taps,
                        Rows dx) {
  GroupedDgrad p{};
  p.g = pointer<const void>(g[0]);
  p.g_stride = static_cast<long long>(g[1]);
  p.w = pointer<const void>(w);
  p.dpool = pointer<const void>(dpool[0]);
  p.dpool_stride = static_cast<long long>(dpool[1]);
  p.taps = pointer<const unsigned char>(taps[0]);
  p.taps_stride = static_cast<long long>(taps[1]);
  p.dx = pointer<void>(dx[0]);
  p.dx_stride = static_cast<long long>(dx[1]);
  p.m = m;
  p.k = k;
  p.c = c;
  p.height = image[0];
  p.width = image[1];
  const Tile shape{tile[0], tile[1], aligned};
  const Target target{device, pointer<void>(stream)};
  with_element(refuse_dgrad, element, [&](auto e) { grouped_dgrad<decltype(e)>(p, shape, target); });
}

TileList list(const std::vector<TileFacts>& tiles) {
  TileList out;
  for (const TileFacts& f : tiles)
    out.push_back({f.tile.block_m, f.tile.block_n, f.tile.aligned, f.threads, f.shared_bytes});
  return out;
}

TileList bind_grouped_gemm_tiles(const std::string& element) {
  TileList out;
  with_element(refuse_gemm, element, [&](auto e) { out = list(grouped_gemm_tiles<decltype(e)>()); });
  return out;
}

TileList bind_grouped_dgrad_tiles(const std::string& element) {
  TileList out;
  with_element(refuse_dgrad, element, [&](auto e) { out = list(grouped_dgrad_tiles<decltype(e)>()); });
  return out;
}

void probe(int device) {
  for (const char* element : {"bf16", "fp16", "tf32"}) {
    with_element(refuse_gemm, element, [&](auto e) { probe_grouped_gemm<decltype(e)>(device); });
    with_element(refuse_dgrad, element, [&](auto e) { probe_grouped_dgrad<decltype(e)>(device); });
  }
}

}  // namespace
}  // namespace inception_fused

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled kernels of inception_fused. Private: inception_fused.runtime.native is its only caller.";
  module.attr("INTERFACE") = 2;  // as inception_fused/runtime/native.py expects it
  module.attr("cuda") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  using namespace py::literals;
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("grouped_gemm", &inception_fused::bind_grouped_gemm, release, py::kw_only(), "element"_a, "tile"_a,
             "aligned"_a, "device"_a, "stream"_a, "m"_a, "c"_a, "k"_a, "x"_a, "w"_a, "y"_a, "r"_a, "bits"_a, "shift"_a,
             "shift_type"_a, "scale"_a, "scale_type"_a, "relu"_a,
             "K1, one launch. element: bf16, fp16 or tf32. tile: (block_m, block_n). x, y, bits: (address, row "
             "stride in elements); r: (address, row stride, first column of the third group). w, shift, scale: one "
             "address a group. shift_type, scale_type: 0 none, 1 fp32, 2 fp16, 3 bf16, 4 fp64. ValueError: a problem "
             "that contradicts itself or the tile; RuntimeError: CUDA's refusal.");
  module.def("grouped_gemm_tiles", &inception_fused::bind_grouped_gemm_tiles, "element"_a,
             "The tiles of K1: [block_m, block_n, aligned, threads, bytes of shared memory] each.");
  module.def("grouped_dgrad", &inception_fused::bind_grouped_dgrad, release, py::kw_only(), "element"_a, "tile"_a,
             "aligned"_a, "device"_a, "stream"_a, "m"_a, "k"_a, "c"_a, "image"_a, "g"_a, "w"_a, "dpool"_a, "taps"_a,
             "dx"_a,
             "B3, one launch. image: (height, width). g, dpool, taps, dx: (address, row stride in elements); w: its "
             "address. Else as grouped_gemm.");
  module.def("grouped_dgrad_tiles", &inception_fused::bind_grouped_dgrad_tiles, "element"_a, "The tiles of B3.");
  module.def("probe", &inception_fused::probe, release, "device"_a,
             "RuntimeError where this build's kernels cannot be loaded on a device.");
}
