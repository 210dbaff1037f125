// Turns that shared memory takes for an access of a warp, by csrc's own layouts: 1 is free of bank conflicts.
//
// 32 banks of 4 bytes; a turn serves 128 bytes: all lanes' words, sixteen lanes' pairs or eight lanes' chunks, which
// wait for each other where they want different words of one bank. Prints, for every tile, the mean turns of an
// operand's copy, of ldmatrix, of a fragment's store into the finished tile and of the epilogue's read.
#include <cstdio>
#include <functional>
#include <map>
#include <set>
#include <vector>

#include "grouped_dgrad.cuh"
#include "grouped_gemm.cuh"

namespace inception_fused {
namespace {

struct Turns {
  double sum = 0;
  int count = 0;

  void access(int size, const std::function<unsigned(int)>& address) {
    for (int first = 0; first < 32; first += 128 / size) {
      std::map<unsigned, std::set<unsigned>> words;
      for (int lane = first; lane < first + 128 / size; ++lane)
        for (int i = 0; i < size / 4; ++i) words[(address(lane) / 4 + i) % 32].insert(address(lane) / 4 + i);
      size_t most = 0;
      for (const auto& [bank, wanted] : words) most = std::max(most, wanted.size());
      sum += static_cast<double>(most);
      ++count;
    }
  }
  double mean() const { return sum / count; }
};

// part: columns of a row that a thread of the epilogue takes, one chunk at a time.
template <class Config>
void report(const char* name, int part) {
  constexpr int READ = Config::RESULT_CHUNK;
  const int row_parts = Config::BLOCK_N / part;
  Turns copy, load, store, read;
  for (int first = 0; first < Config::THREADS; first += 32)
    copy.access(16, [&](int lane) {
      return operand_chunk((first + lane) / Config::ROW_CHUNKS, (first + lane) % Config::ROW_CHUNKS);
    });
  for (int chunk = 0; chunk < Config::ROW_CHUNKS; chunk += Config::MMA_CHUNKS) {
    load.access(16, [&](int lane) { return operand_chunk(lane % 16, chunk + lane / 16); });
    load.access(16, [&](int lane) { return operand_chunk(lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2); });
  }
  for (int row = 0; row < Config::BLOCK_M; row += 8)
    for (int column = 0; column < Config::BLOCK_N; column += Config::MMA_N)
      store.access(2 * sizeof(typename Config::Result),
                   [&](int lane) { return result_element<Config>(row + lane / 4, column + lane % 4 * 2); });
  for (int first = 0; first < Config::BLOCK_M * row_parts; first += 32)
    for (int e = 0; e < part; e += READ)
      read.access(16, [&](int lane) {
        return result_element<Config>((first + lane) / row_parts, (first + lane) % row_parts * part + e);
      });
  std::printf("%s %dx%d %.3f %.3f %.3f %.3f\n", name, Config::BLOCK_M, Config::BLOCK_N, copy.mean(), load.mean(),
              store.mean(), read.mean());
}

template <class Element>
void gemm(const char* name) {
  report<GroupedGemmConfig<Element, 128, 128, true>>(name, 8);
  report<GroupedGemmConfig<Element, 128, 96, true>>(name, 8);
  report<GroupedGemmConfig<Element, 64, 64, true>>(name, 8);
}

template <class Element>
void dgrad(const char* name) {
  report<GroupedDgradConfig<Element, 128, 128, true>>(name, 16 / sizeof(Element));
  report<GroupedDgradConfig<Element, 64, 64, true>>(name, 16 / sizeof(Element));
}

}  // namespace
}  // namespace inception_fused

int main() {
  using namespace inception_fused;
  gemm<bf16>("K1 bf16"), gemm<tf32>("K1 tf32");
  dgrad<bf16>("B3 bf16"), dgrad<tf32>("B3 tf32");
}
