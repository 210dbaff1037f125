// One simulated thread: a function with a stack of its own that can be left and resumed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define SIM_OWN_SWITCH 1  // 10 ns a switch; swapcontext enters the kernel each time
#else
#include <ucontext.h>
#endif

namespace sim {

#ifdef SIM_OWN_SWITCH
// Saves what a callee must preserve on the old stack, goes on with the new one (System V AMD64 ABI). Weak, since every
// source that includes this defines it.
extern "C" void sim_switch_stack(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.weak sim_switch_stack
.hidden sim_switch_stack
.type sim_switch_stack, @function
sim_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sim_switch_stack, .-sim_switch_stack
)");
#endif

class Fiber {
 public:
  static constexpr std::size_t STACK_BYTES = 256 * 1024;

  Fiber() : stack_(new unsigned char[STACK_BYTES]) {}

  // The next resume() begins body. It must not throw.
  void start(std::function<void()> body) {
    body_ = std::move(body);
    done_ = false;
#ifdef SIM_OWN_SWITCH
    auto top = reinterpret_cast<std::uintptr_t>(stack_.get() + STACK_BYTES) & ~std::uintptr_t{15};
    auto* slots = reinterpret_cast<void**>(top);
    // Return address of enter's caller (none), then enter itself, then six registers. At enter's first instruction
    // the stack pointer is 8 beyond a multiple of 16, as after a call.
    *--slots = nullptr;
    *--slots = reinterpret_cast<void*>(&Fiber::enter);
    for (int i = 0; i < 6; ++i) *--slots = nullptr;
    own_ = slots;
#else
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_.get();
    own_.uc_stack.ss_size = STACK_BYTES;
    own_.uc_link = nullptr;
    makecontext(&own_, &Fiber::enter, 0);
#endif
  }

  // Runs the fiber until it leaves or ends.
  void resume() {
    current() = this;
#ifdef SIM_OWN_SWITCH
    sim_switch_stack(&caller_, own_);
#else
    swapcontext(&caller_, &own_);
#endif
  }

  // From inside: back to whoever resumed it.
  void leave() {
#ifdef SIM_OWN_SWITCH
    sim_switch_stack(&own_, caller_);
#else
    swapcontext(&own_, &caller_);
#endif
  }

  bool done() const { return done_; }

 private:
  static Fiber*& current() {
    static thread_local Fiber* fiber = nullptr;
    return fiber;
  }

  static void enter() {
    Fiber* self = current();
    self->body_();
    self->done_ = true;
    self->leave();
  }

  std::unique_ptr<unsigned char[]> stack_;
  std::function<void()> body_;
  bool done_ = true;
#ifdef SIM_OWN_SWITCH
  void* own_ = nullptr;
  void* caller_ = nullptr;
#else
  ucontext_t own_{}, caller_{};
#endif
};

}  // namespace sim
