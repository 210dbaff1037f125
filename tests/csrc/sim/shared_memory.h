// A block's shared memory: poisoned, range-checked, and watched for accesses that no barrier keeps apart.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace sim {

// Something that hardware leaves undefined. Its text is what the simulated launch reports.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Where = std::source_location;

template <class... Parts>
[[noreturn]] void fault(const Where& where, const Parts&... parts) {
  std::ostringstream text;
  text << "simulator: ";
  (text << ... << parts);
  const std::string file = where.file_name();
  text << " at " << file.substr(file.rfind('/') + 1) << ":" << where.line();
  throw Fault(text.str());
}

class SharedMemory {
 public:
  static constexpr int WARP = -2;  // a reader that is a whole warp: no thread has written for it

  // All bytes 0xff: NaN in bf16, fp16 and fp32, and still NaN in TF32.
  void reset(std::size_t bytes) {
    bytes_.assign(bytes, 0xff);
    words_.assign((bytes + 3) / 4, Word{});
    epoch_ = 0;
  }

  // A barrier of all threads: accesses before it and after it are in order.
  void barrier() { ++epoch_; }

  void read(void* out, unsigned from, unsigned size, int thread, const Where& where) {
    check(from, size, "read", where);
    for (Word& word : words(from, size)) {
      if (word.pending) fault(where, "a read of byte ", from, ", which a copy may still be writing");
      if (word.written == epoch_ && word.writer != thread)
        fault(where, "no barrier between the write of byte ", from, " by thread ", word.writer, " and this read");
      word.reader = word.read == epoch_ && word.reader != thread ? WARP : thread;
      word.read = epoch_;
    }
    std::memcpy(out, bytes_.data() + from, size);
  }

  void write(unsigned to, const void* data, unsigned size, int thread, const Where& where) {
    claim(to, size, thread, where);
    settle(to, size, thread);
    std::memcpy(bytes_.data() + to, data, size);
  }

  // An asynchronous write begins: from now on nobody may touch these bytes, until settle().
  void begin(unsigned to, unsigned size, int thread, const Where& where) {
    claim(to, size, thread, where);
    for (Word& word : words(to, size)) word.pending = true;
  }

  // Its bytes arrive.
  void arrive(unsigned to, const void* data, unsigned size) { std::memcpy(bytes_.data() + to, data, size); }

  // The thread that began it has waited for it: others see it after the next barrier.
  void settle(unsigned to, unsigned size, int thread) {
    for (Word& word : words(to, size)) {
      word.pending = false;
      word.writer = thread;
      word.written = epoch_;
    }
  }

 private:
  // Last accesses of four bytes; epochs count barriers.
  struct Word {
    long written = -1, read = -1;
    int writer = -1, reader = -1;
    bool pending = false;
  };

  struct Range {
    Word *first, *last;
    Word* begin() const { return first; }
    Word* end() const { return last; }
  };

  Range words(unsigned from, unsigned size) {
    return {words_.data() + from / 4, words_.data() + (from + size + 3) / 4};
  }

  void check(unsigned at, unsigned size, const char* what, const Where& where) const {
    if (at + std::size_t{size} > bytes_.size())
      fault(where, what, " of ", size, " bytes at ", at, ", beyond the ", bytes_.size(), " bytes of shared memory");
    if (at % size != 0) fault(where, what, " of ", size, " bytes at ", at, ", which is misaligned");
  }

  void claim(unsigned to, unsigned size, int thread, const Where& where) {
    check(to, size, "write", where);
    for (Word& word : words(to, size)) {
      if (word.pending) fault(where, "thread ", thread, " writes byte ", to, ", which a copy may still be writing");
      if (word.written == epoch_ && word.writer != thread)
        fault(where, "no barrier between the writes of byte ", to, " by threads ", word.writer, " and ", thread);
      if (word.read == epoch_ && word.reader != thread)
        fault(where, "no barrier between a read of byte ", to, " and its overwriting by thread ", thread);
    }
  }

  std::vector<unsigned char> bytes_;
  std::vector<Word> words_;
  long epoch_ = 0;
};

}  // namespace sim
