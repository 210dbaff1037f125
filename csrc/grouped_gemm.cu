// K1's launcher for one element type, which the build names: INCEPTION_FUSED_ELEMENT is bf16, fp16 or tf32.
#include "grouped_gemm.cuh"
#include "launch.h"

namespace inception_fused {
namespace {

// The one table of tiles. inception_fused/plan.py chooses among them.
template <class Element, class Visitor>
void for_each_config(const Visitor& visit) {
  visit(GroupedGemmConfig<Element, 128, 128, true>{});
  visit(GroupedGemmConfig<Element, 128, 96, true>{});
  visit(GroupedGemmConfig<Element, 64, 64, true>{});
  visit(GroupedGemmConfig<Element, 64, 64, false>{});
}

template <class Config>
constexpr Tile tile_of(Config) {
  return {Config::BLOCK_M, Config::BLOCK_N, Config::ALIGNED};
}

std::string name(const Tile& tile) {
  return std::to_string(tile.block_m) + "x" + std::to_string(tile.block_n) + (tile.aligned ? "" : " unaligned");
}

template <class Element>
std::string known_tiles() {
  std::string known;
  for_each_config<Element>([&](auto config) { known += (known.empty() ? "" : ", ") + name(tile_of(config)); });
  return known;
}

template <class Element, class Visitor>
void with_config(const Tile& tile, const Visitor& visit) {
  bool found = false;
  for_each_config<Element>([&](auto config) {
    const Tile one = tile_of(config);
    if (one.block_m != tile.block_m || one.block_n != tile.block_n || one.aligned != tile.aligned) return;
    found = true;
    visit(config);
  });
  if (!found)
    throw std::invalid_argument("grouped_gemm: tile: got " + name(tile) + ", wants one of " + known_tiles<Element>());
}

template <class Config>
Kernel<GroupedGemm>& kernel_of(Config) {
  static Kernel<GroupedGemm> kernel(grouped_gemm_kernel<Config>, Config::THREADS, Config::SHARED_BYTES);
  return kernel;
}

std::string describe(const GroupedGemm& p, const Tile& tile, const Target& target) {
  std::string text = "grouped_gemm (K1, GEMM_M " + std::to_string(p.m) + ", GEMM_K " + std::to_string(p.c);
  text += ", GEMM_N ";
  for (int g = 0; g < kGroups; ++g) text += (g ? "+" : "") + std::to_string(p.k[g]);
  return text + ", tile " + name(tile) + ", device " + std::to_string(target.device) + ")";
}

[[noreturn]] void refuse(const std::string& what, const std::string& got, const std::string& wants) {
  throw std::invalid_argument("grouped_gemm: " + what + ": got " + got + ", wants " + wants);
}

// What would read or write outside a tensor, or off a boundary that a 16-byte access needs.
void check_problem(const GroupedGemm& p, const Tile& tile, int element_bytes) {
  const long long n = 0ll + p.k[0] + p.k[1] + p.k[2];
  if (p.m < 0 || p.c < 1 || p.k[0] < 0 || p.k[1] < 0 || p.k[2] < 0 || n < 1)
    refuse("sizes", std::to_string(p.m) + ", " + std::to_string(p.c) + ", " + std::to_string(n),
           "m >= 0, c >= 1, no negative group and at least one column");
  if (p.x_stride < p.c) refuse("x_stride", std::to_string(p.x_stride), "at least c = " + std::to_string(p.c));
  if (p.y_stride < p.k[0]) refuse("y_stride", std::to_string(p.y_stride), "at least k[0] = " + std::to_string(p.k[0]));
  if (p.r5 < p.k[1]) refuse("r5", std::to_string(p.r5), "at least k[1] = " + std::to_string(p.k[1]));
  if (p.r_stride < 0ll + p.r5 + p.k[2])
    refuse("r_stride", std::to_string(p.r_stride), "at least r5 + k[2] = " + std::to_string(0ll + p.r5 + p.k[2]));
  if (p.bits != nullptr && (p.relu == 0 || p.bits_stride < (p.k[0] + 7) / 8))
    refuse("bits", "relu " + std::to_string(p.relu) + ", bits_stride " + std::to_string(p.bits_stride),
           "ReLU and at least " + std::to_string((p.k[0] + 7) / 8) + " bytes a row");
  // Columns of the last tile are computed beyond n, columns of K up to a step beyond c; in 32 bits.
  constexpr long long kLimit = (1ll << 31) - 1024;
  if (p.m > kLimit || p.c > kLimit || n > kLimit)
    refuse("sizes", std::to_string(p.m) + ", " + std::to_string(p.c) + ", " + std::to_string(n), "under 2**31 - 1024");
  if (!tile.aligned) return;
  const int unit = 16 / element_bytes;
  for (long long size :
       {0ll + p.c, 0ll + p.k[0], 0ll + p.k[1], 0ll + p.k[2], 0ll + p.r5, p.x_stride, p.y_stride, p.r_stride})
    if (size % unit != 0) refuse("an aligned tile", std::to_string(size), "multiples of " + std::to_string(unit));
  const void* const y = p.y;
  const void* const r = p.r;
  for (const void* pointer : {p.x, p.w[0], p.w[1], p.w[2], y, r})
    if (reinterpret_cast<unsigned long long>(pointer) % 16 != 0)
      refuse("an aligned tile", "an address that is no multiple of 16", "x, w, y and r on 16 bytes");
}

}  // namespace

template <class Element>
void grouped_gemm(const GroupedGemm& problem, const Tile& tile, const Target& target) {
  check_problem(problem, tile, sizeof(Element));
  with_config<Element>(tile, [&](auto config) {
    using Config = decltype(config);
    const long long tiles_m = (problem.m + Config::BLOCK_M - 1ll) / Config::BLOCK_M;
    const long long tiles_n = (problem.k[0] + problem.k[1] + problem.k[2] + Config::BLOCK_N - 1ll) / Config::BLOCK_N;
    if (tiles_m == 0) return;
    if (tiles_m * tiles_n >= 1ll << 31) refuse("m", std::to_string(problem.m), "fewer than 2**31 tiles");
    const auto what = [&] { return describe(problem, tile, target); };
    const CurrentDevice current(target.device, what);
    kernel_of(config).launch(problem, static_cast<unsigned>(tiles_m * tiles_n), target.device, target.stream, what);
  });
}

template <class Element>
void probe_grouped_gemm(int device) {
  const auto what = [&] { return "grouped_gemm (K1) on device " + std::to_string(device); };
  const CurrentDevice current(device, what);
  for_each_config<Element>([&](auto config) { kernel_of(config).prepare(device, what); });
}

template <class Element>
std::vector<TileFacts> grouped_gemm_tiles() {
  std::vector<TileFacts> out;
  for_each_config<Element>([&](auto config) {
    using Config = decltype(config);
    out.push_back({tile_of(config), Config::THREADS, Config::SHARED_BYTES});
  });
  return out;
}

template void grouped_gemm<INCEPTION_FUSED_ELEMENT>(const GroupedGemm&, const Tile&, const Target&);
template void probe_grouped_gemm<INCEPTION_FUSED_ELEMENT>(int);
template std::vector<TileFacts> grouped_gemm_tiles<INCEPTION_FUSED_ELEMENT>();

}  // namespace inception_fused
