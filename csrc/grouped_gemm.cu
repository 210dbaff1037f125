// K1's launcher for one element type, which the build names: INCEPTION_FUSED_ELEMENT is bf16, fp16 or tf32.
#include "grouped_gemm.cuh"
#include "tile_table.h"

namespace inception_fused {
namespace {

// inception_fused/plan/launches.py has these too.
template <class Element>
using Tiles = TileTable<GroupedGemmConfig<Element, 128, 128, true>, GroupedGemmConfig<Element, 128, 96, true>,
                        GroupedGemmConfig<Element, 64, 64, true>, GroupedGemmConfig<Element, 64, 64, false>>;

template <class Config>
Kernel<GroupedGemm>& kernel(Config) {
  return kernel_of<Config, GroupedGemm, grouped_gemm_kernel<Config>>();
}

std::string describe(const GroupedGemm& p, const Tile& tile, const Target& target) {
  std::string columns;
  for (int g = 0; g < kGroups; ++g) columns += (g ? "+" : "") + std::to_string(p.k[g]);
  return describe("grouped_gemm (K1", p.m, p.c, columns, tile, target);
}

constexpr Refuse refuse{"grouped_gemm"};

// What would read or write outside a tensor, or off a boundary that a 16-byte access needs.
void check_problem(const GroupedGemm& p, const Tile& tile, int element_bytes) {
  const long long n = 0ll + p.k[0] + p.k[1] + p.k[2];
  if (p.m < 0 || p.c < 1 || p.k[0] < 0 || p.k[1] < 0 || p.k[2] < 0 || n < 1)
    refuse("sizes", std::to_string(p.m) + ", " + std::to_string(p.c) + ", " + std::to_string(n),
           "m >= 0, c >= 1, no negative group and at least one column");
  refuse.stride("x_stride", p.x_stride, "c", p.c);
  refuse.stride("y_stride", p.y_stride, "k[0]", p.k[0]);
  refuse.stride("r5", p.r5, "k[1]", p.k[1]);
  refuse.stride("r_stride", p.r_stride, "r5 + k[2]", 0ll + p.r5 + p.k[2]);
  if (p.bits != nullptr && (p.relu == 0 || p.bits_stride < (p.k[0] + 7) / 8))
    refuse("bits", "relu " + std::to_string(p.relu) + ", bits_stride " + std::to_string(p.bits_stride),
           "ReLU and at least " + std::to_string((p.k[0] + 7) / 8) + " bytes a row");
  if (p.m > kSizeLimit || p.c > kSizeLimit || n > kSizeLimit)
    refuse("sizes", std::to_string(p.m) + ", " + std::to_string(p.c) + ", " + std::to_string(n), "under 2**31 - 1024");
  if (!tile.aligned) return;
  refuse.unaligned(16 / element_bytes, {p.c, p.k[0], p.k[1], p.k[2], p.r5, p.x_stride, p.y_stride, p.r_stride}, 16,
                   {p.x, p.w[0], p.w[1], p.w[2], p.y, p.r}, "x, w, y and r");
}

}  // namespace

template <class Element>
void grouped_gemm(const GroupedGemm& problem, const Tile& tile, const Target& target) {
  check_problem(problem, tile, sizeof(Element));
  const auto what = [&] { return describe(problem, tile, target); };
  Tiles<Element>::with(tile, refuse, [&](auto config) {
    const long long n = 0ll + problem.k[0] + problem.k[1] + problem.k[2];
    launch_tiles(kernel(config), problem, config, problem.m, n, target, refuse, what);
  });
}

template <class Element>
void probe_grouped_gemm(int device) {
  const auto what = [&] { return "grouped_gemm (K1) on device " + std::to_string(device); };
  const CurrentDevice current(device, what);
  Tiles<Element>::for_each([&](auto config) { kernel(config).prepare(device, what); });
}

template <class Element>
std::vector<TileFacts> grouped_gemm_tiles() {
  return Tiles<Element>::facts();
}

template void grouped_gemm<INCEPTION_FUSED_ELEMENT>(const GroupedGemm&, const Tile&, const Target&);
template void probe_grouped_gemm<INCEPTION_FUSED_ELEMENT>(int);
template std::vector<TileFacts> grouped_gemm_tiles<INCEPTION_FUSED_ELEMENT>();

}  // namespace inception_fused
