// A kernel's table of tiles, and what its launcher does with one: look it up, launch it, load it. Host code; a Config
// is a GemmTile of gemm_tile.cuh.
#pragma once

#include <string>
#include <vector>

#include "launch.h"
#include "refuse.h"
#include "tile.h"

namespace inception_fused {

// Sizes end here: what is computed in 32 bits reaches a tile beyond m and n and a step beyond k.
constexpr long long kSizeLimit = (1ll << 31) - 1024;

inline std::string name(const Tile& tile) {
  return std::to_string(tile.block_m) + "x" + std::to_string(tile.block_n) + (tile.aligned ? "" : " unaligned");
}

// A launch as the messages of CUDA's refusals name it. columns: GEMM_N as the problem has it.
inline std::string describe(const std::string& kernel, long long m, long long k, const std::string& columns,
                            const Tile& tile, const Target& target) {
  return kernel + ", GEMM_M " + std::to_string(m) + ", GEMM_K " + std::to_string(k) + ", GEMM_N " + columns +
         ", tile " + name(tile) + ", device " + std::to_string(target.device) + ")";
}

// The configurations for which a kernel is compiled, in the order in which callers see them.
template <class... Configs>
struct TileTable {
  template <class Visitor>
  static void for_each(const Visitor& visit) {
    (visit(Configs{}), ...);
  }

  static std::vector<TileFacts> facts() { return {{tile_of(Configs{}), Configs::THREADS, Configs::SHARED_BYTES}...}; }

  // Calls visit with the configuration of a tile. Throws std::invalid_argument where the table has no such tile.
  template <class Visitor>
  static void with(const Tile& tile, const Refuse& refuse, const Visitor& visit) {
    bool found = false;
    std::string known;
    for_each([&](auto config) {
      const Tile one = tile_of(config);
      known += (known.empty() ? "" : ", ") + name(one);
      if (one.block_m != tile.block_m || one.block_n != tile.block_n || one.aligned != tile.aligned) return;
      found = true;
      visit(config);
    });
    if (!found) refuse("tile", name(tile), "one of " + known);
  }

 private:
  template <class Config>
  static constexpr Tile tile_of(Config) {
    return {Config::BLOCK_M, Config::BLOCK_N, Config::ALIGNED};
  }
};

// The one Kernel of a function, which remembers the devices that it was prepared on.
template <class Config, class Problem, void (*FUNCTION)(Problem)>
Kernel<Problem>& kernel_of() {
  static Kernel<Problem> kernel(FUNCTION, Config::THREADS, Config::SHARED_BYTES);
  return kernel;
}

// One block for every tile of m rows and n columns; none where m is 0.
template <class Config, class Problem, class What>
void launch_tiles(Kernel<Problem>& kernel, const Problem& problem, Config, long long m, long long n,
                  const Target& target, const Refuse& refuse, const What& what) {
  const long long tiles_m = (m + Config::BLOCK_M - 1) / Config::BLOCK_M;
  const long long tiles_n = (n + Config::BLOCK_N - 1) / Config::BLOCK_N;
  if (tiles_m == 0) return;
  if (tiles_m * tiles_n >= 1ll << 31) refuse("m", std::to_string(m), "fewer than 2**31 tiles");
  const CurrentDevice current(target.device, what);
  kernel.launch(problem, static_cast<unsigned>(tiles_m * tiles_n), target.device, target.stream, what);
}

}  // namespace inception_fused
