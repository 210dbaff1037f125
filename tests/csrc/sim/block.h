// One thread block: its fibers, what they wait for, their copies, and the order in which all of it happens.
//
// Everything that waits does so through wait(); everything asynchronous is a Copy in a queue, carried out as the
// timing says. A transaction barrier, a tensor copy or a warpgroup's matrix instruction is one more condition to wait
// for and one more kind of entry in the queue.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"

namespace sim {

// Global memory that copies may read; anything, while there is none.
struct Allowed {
  const unsigned char* first;
  std::size_t size;
};

inline std::vector<Allowed>& allowed_ranges() {
  static std::vector<Allowed> ranges;
  return ranges;
}

// When asynchronous work happens: as late as allowed, at once, or at random moments while warps stall at random.
enum class Timing { lazy, eager, random };

struct Copy {
  unsigned to;
  const void* from;
  unsigned size, read;  // bytes; those beyond read are zero
  int thread;
  bool arrived;
};

class Block {
 public:
  static constexpr int LANES = 32;

  Block(Timing timing, unsigned long long seed) : timing_(timing), random_(seed) {}

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  int thread() const { return running_; }
  int index() const { return index_; }
  SharedMemory& shared() { return shared_; }

  // Runs body once in each of threads fibers. Throws Fault.
  void run(int index, int threads, std::size_t shared_bytes, const std::function<void()>& body) {
    if (threads < 1 || threads % LANES != 0) throw Fault("simulator: a block of whole warps is wanted");
    index_ = index;
    shared_.reset(shared_bytes);
    if (fibers_.size() < static_cast<std::size_t>(threads)) fibers_.resize(threads);
    states_.assign(threads, {});
    warps_.assign(threads / LANES, {});
    barrier_ = {};
    failure_.clear();
    for (int t = 0; t < threads; ++t)
      fibers_[t].start([this, &body] {
        try {
          body();
        } catch (const std::exception& error) {
          if (failure_.empty()) failure_ = error.what();
        }
        states_[running_].ended = true;
      });
    Block* outer = std::exchange(current(), this);
    schedule();
    current() = outer;
    if (!failure_.empty()) throw Fault(failure_);
  }

  // Lets others run until ready() holds. what: for the report of a deadlock.
  template <class Ready>
  void wait(const char* what, const Where& where, const Ready& ready) {
    State& state = states_[running_];
    state.what = what;
    state.where = where;
    state.context = &ready;
    state.ready = [](const void* context) { return (*static_cast<const Ready*>(context))(); };
    fibers_[running_].leave();
  }

  // All threads arrive before one goes on. They must arrive at the same place.
  void sync_threads(const Where& where) {
    meet(barrier_, states_.size(), "the barrier", where, [this](int) {}, [this] { shared_.barrier(); });
  }

  // All lanes of a warp arrive, at the same place; the last performs the operation on all their arguments.
  template <class Arguments, class Perform>
  void collective(const char* what, const Where& where, Arguments& arguments, const Perform& perform) {
    Warp& warp = warps_[running_ / LANES];
    meet(
        warp.meeting, LANES, what, where, [&](int thread) { warp.arguments[thread % LANES] = &arguments; },
        [&] { perform(reinterpret_cast<Arguments* const*>(warp.arguments)); });
  }

  // One asynchronous copy in this thread's open group.
  void copy(unsigned to, const void* from, unsigned size, unsigned read, const Where& where) {
    check_global(from, read, where);
    shared_.begin(to, size, running_, where);
    State& state = states_[running_];
    state.open.push_back({to, from, size, read, running_, false});
    if (timing_ == Timing::eager) arrive(state.open.back());
    pause(where);
  }

  void commit() {
    State& state = states_[running_];
    state.groups.push_back(std::move(state.open));
    state.open.clear();
  }

  void wait_copies(std::size_t pending, const Where& where) {
    pause(where);
    State& state = states_[running_];
    while (state.groups.size() > pending) {
      for (Copy& copy : state.groups.front()) {
        if (!copy.arrived) arrive(copy);
        shared_.settle(copy.to, copy.size, copy.thread);
      }
      state.groups.pop_front();
    }
  }

  // A place where hardware may run others first; random timing does so now and then.
  void pause(const Where& where) {
    if (timing_ == Timing::random && random_() % 16 == 0) wait("its turn", where, [] { return true; });
  }

 private:
  // Threads that have come to one place.
  struct Meeting {
    std::size_t arrived = 0;
    unsigned long long round = 0;
    const char* what = "";
    Where where;
  };

  struct Warp {
    Meeting meeting;
    void* arguments[LANES] = {};
    int stalled = 0;  // rounds of the scheduler to be left out
  };

  struct State {
    const char* what = "its start";
    Where where;
    const void* context = nullptr;
    bool (*ready)(const void*) = [](const void*) { return true; };
    bool ended = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
  };

  template <class Arrive, class Last>
  void meet(Meeting& meeting, std::size_t size, const char* what, const Where& where, const Arrive& arrive,
            const Last& last) {
    if (meeting.arrived == 0) {
      meeting.what = what;
      meeting.where = where;
    } else if (meeting.what != std::string(what) || meeting.where.line() != where.line()) {
      fault(where, "divergence: thread ", running_, " is at ", what, " while others are at ", meeting.what, " in line ",
            meeting.where.line());
    }
    arrive(running_);
    if (++meeting.arrived == size) {
      last();
      meeting.arrived = 0;
      ++meeting.round;
      return;
    }
    wait(what, where, [&meeting, round = meeting.round] { return meeting.round != round; });
  }

  static void check_global(const void* from, unsigned size, const Where& where) {
    const auto* at = static_cast<const unsigned char*>(from);
    const auto holds = [=](const Allowed& a) { return at >= a.first && at + size <= a.first + a.size; };
    const auto& ranges = allowed_ranges();
    if (size != 0 && !ranges.empty() && std::none_of(ranges.begin(), ranges.end(), holds))
      fault(where, "a copy reads ", size, " bytes outside every tensor");
  }

  void arrive(Copy& copy) {
    unsigned char data[16] = {};
    std::memcpy(data, copy.from, copy.read);
    shared_.arrive(copy.to, data, copy.size);
    copy.arrived = true;
  }

  // A tenth of what is under way arrives, in any order.
  void arrive_at_random() {
    for (State& state : states_) {
      for (Copy& copy : state.open)
        if (!copy.arrived && random_() % 10 == 0) arrive(copy);
      for (auto& group : state.groups)
        for (Copy& copy : group)
          if (!copy.arrived && random_() % 10 == 0) arrive(copy);
    }
  }

  void schedule() {
    const int warps = static_cast<int>(warps_.size());
    for (;;) {
      bool alive = false, moved = false, stalled = false;
      const int first = timing_ == Timing::random ? static_cast<int>(random_() % warps) : 0;
      for (int i = 0; i < warps; ++i) {
        const int w = (first + i) % warps;
        if (timing_ == Timing::random && warps_[w].stalled == 0 && random_() % 4 == 0)
          warps_[w].stalled = static_cast<int>(random_() % 64);
        for (int t = w * LANES; t < (w + 1) * LANES; ++t) {
          State& state = states_[t];
          if (state.ended) continue;
          alive = true;
          if (warps_[w].stalled > 0 || !state.ready(state.context)) continue;
          moved = true;
          running_ = t;
          fibers_[t].resume();
          if (!failure_.empty()) return;
        }
        if (warps_[w].stalled > 0) {
          --warps_[w].stalled;
          stalled = true;
        }
      }
      if (!alive) return;
      if (timing_ == Timing::random) arrive_at_random();
      if (!moved && !stalled) return report_deadlock();
    }
  }

  void report_deadlock() {
    std::ostringstream text;
    text << "simulator: divergence or deadlock:";
    for (std::size_t t = 0; t < states_.size(); t += LANES) {
      std::string seen;
      for (std::size_t lane = t; lane < t + LANES; ++lane) {
        const State& state = states_[lane];
        const std::string at =
            state.ended ? "ended" : state.what + std::string(" in line ") + std::to_string(state.where.line());
        if (at != seen) text << " thread " << lane << (state.ended ? " has " : " waits at ") << at << ";";
        seen = at;
      }
    }
    failure_ = text.str();
  }

  Timing timing_;
  std::mt19937_64 random_;
  int index_ = 0, running_ = 0;
  SharedMemory shared_;
  std::deque<Fiber> fibers_;
  std::vector<State> states_;
  std::vector<Warp> warps_;
  Meeting barrier_;
  std::string failure_;
};

}  // namespace sim
