// B3's launcher for one element type, which the build names: INCEPTION_FUSED_ELEMENT is bf16, fp16 or tf32.
#include "grouped_dgrad.cuh"
#include "tile_table.h"

namespace inception_fused {
namespace {

// inception_fused/plan/launches.py has these too. No 128x96 as in K1: the nine blocks' 192 to 832 channels fill 92%
// of the columns of 128-wide tiles, weighted by their products, and 98% of 96-wide ones; the gather does not grow with
// either.
template <class Element>
using Tiles = TileTable<GroupedDgradConfig<Element, 128, 128, true>, GroupedDgradConfig<Element, 64, 64, true>,
                        GroupedDgradConfig<Element, 64, 64, false>>;

template <class Config>
Kernel<GroupedDgrad>& kernel(Config) {
  return kernel_of<Config, GroupedDgrad, grouped_dgrad_kernel<Config>>();
}

std::string describe(const GroupedDgrad& p, const Tile& tile, const Target& target) {
  return describe("grouped_dgrad (B3", p.m, p.k, std::to_string(p.c), tile, target);
}

constexpr Refuse refuse{"grouped_dgrad"};

// What would read or write outside a tensor, or off a boundary that a wide access needs.
void check_problem(const GroupedDgrad& p, const Tile& tile, int element_bytes) {
  const std::string sizes = std::to_string(p.m) + ", " + std::to_string(p.k) + ", " + std::to_string(p.c);
  if (p.m < 0 || p.k < 1 || p.c < 1) refuse("sizes", sizes, "m >= 0, k >= 1 and c >= 1");
  if (p.height < 1 || p.width < 1 || p.m % (1ll * p.height * p.width) != 0)
    refuse("image", std::to_string(p.height) + " x " + std::to_string(p.width),
           "height and width of whole images in m = " + std::to_string(p.m) + " rows");
  refuse.stride("g_stride", p.g_stride, "k", p.k);
  refuse.stride("dpool_stride", p.dpool_stride, "c", p.c);
  refuse.stride("taps_stride", p.taps_stride, "ceil(c / 2)", (p.c + 1ll) / 2);
  refuse.stride("dx_stride", p.dx_stride, "c", p.c);
  if (p.m > kSizeLimit || p.k > kSizeLimit || p.c > kSizeLimit) refuse("sizes", sizes, "under 2**31 - 1024");
  if (!tile.aligned) return;
  const int unit = 16 / element_bytes;
  refuse.unaligned(unit, {p.k, p.c, p.g_stride, p.dpool_stride, p.dx_stride}, 16, {p.g, p.w, p.dpool, p.dx},
                   "g, w, dpool and dx");
  refuse.unaligned(unit / 2, {p.taps_stride}, unit / 2, {p.taps}, "taps");
}

}  // namespace

template <class Element>
void grouped_dgrad(const GroupedDgrad& problem, const Tile& tile, const Target& target) {
  check_problem(problem, tile, sizeof(Element));
  const auto what = [&] { return describe(problem, tile, target); };
  Tiles<Element>::with(tile, refuse, [&](auto config) {
    launch_tiles(kernel(config), problem, config, problem.m, problem.c, target, refuse, what);
  });
}

template <class Element>
void probe_grouped_dgrad(int device) {
  const auto what = [&] { return "grouped_dgrad (B3) on device " + std::to_string(device); };
  const CurrentDevice current(device, what);
  Tiles<Element>::for_each([&](auto config) { kernel(config).prepare(device, what); });
}

template <class Element>
std::vector<TileFacts> grouped_dgrad_tiles() {
  return Tiles<Element>::facts();
}

template void grouped_dgrad<INCEPTION_FUSED_ELEMENT>(const GroupedDgrad&, const Tile&, const Target&);
template void probe_grouped_dgrad<INCEPTION_FUSED_ELEMENT>(int);
template std::vector<TileFacts> grouped_dgrad_tiles<INCEPTION_FUSED_ELEMENT>();

}  // namespace inception_fused
