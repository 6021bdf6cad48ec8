// What AddressSanitizer and ThreadSanitizer must be told about fibers. Without a sanitizer, nothing.
//
// ThreadSanitizer: the emulator itself is compiled without instrumentation, so that only kernels' accesses count; a
// fiber is a thread to it, and barriers and collectives are the edges between them.
#pragma once
#include "machine.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUEMU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#endif

namespace cuemu::sanitizer {

#if defined(CUEMU_TSAN)
constexpr bool THREADS = true;
constexpr unsigned NO_EDGE = 1;  // a switch alone orders nothing
inline void create(Fiber& f) { f.tsan = __tsan_create_fiber(0); }
inline void destroy(Fiber& f) { __tsan_destroy_fiber(f.tsan); }
inline void enter(Machine& m) { m.tsan = __tsan_get_current_fiber(); }
inline void acquire(void* at) { __tsan_acquire(at); }
inline void release(void* at) { __tsan_release(at); }
inline void reads(const void* p, size_t bytes) { __tsan_read_range((void*)p, bytes); }
inline void writes(void* p, size_t bytes) { __tsan_write_range(p, bytes); }
#else
constexpr bool THREADS = false;
inline void create(Fiber&) {}
inline void destroy(Fiber&) {}
inline void enter(Machine&) {}
inline void acquire(void*) {}
inline void release(void*) {}
inline void reads(const void*, size_t) {}
inline void writes(void*, size_t) {}
#endif

// Around each switch of stacks: `leave_*` before it on the old stack, `arrived` after it on the new one.
inline void leave_for(Fiber& to, void** fake_stack, size_t stack_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, to.stack, stack_bytes);
#elif defined(CUEMU_TSAN)
  __tsan_switch_to_fiber(to.tsan, NO_EDGE);
#endif
  (void)to, (void)fake_stack, (void)stack_bytes;
}
inline void leave_for_scheduler(Machine& m, void** fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, m.stack_bottom, m.stack_size);
#elif defined(CUEMU_TSAN)
  __tsan_switch_to_fiber(m.tsan, NO_EDGE);
#endif
  (void)m, (void)fake_stack;
}
// On a fiber's first run `from_scheduler` learns the scheduler's stack.
inline void arrived(void* fake_stack, const void** bottom = nullptr, size_t* size = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, bottom, size);
#endif
  (void)fake_stack, (void)bottom, (void)size;
}

inline void forbid(const void* p, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(p, bytes);
#endif
  (void)p, (void)bytes;
}
inline void allow(const void* p, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, bytes);
#endif
  (void)p, (void)bytes;
}
}  // namespace cuemu::sanitizer
