// Runs the threads of a block as fibers. A fiber gives way only where a CUDA thread waits for others, and hands over
// directly to the next one: there is no scheduler in between, because 32 lanes that wait at the same instruction then
// cost 32 short switches whose return addresses the CPU predicts.
//
// Seed 0 runs warps and lanes in ascending order. Other seeds draw the next lane, and now and then another warp.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#include "memory.hpp"
#include "sanitizer.hpp"

// Saves the callee-saved registers and the stack pointer of one fiber and takes up another.
extern "C" void cuemu_switch(void** save, void* to);
asm(R"(.text
.globl cuemu_switch
.type cuemu_switch, @function
cuemu_switch:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
)");

namespace cuemu {

constinit thread_local Thread* self;
constinit thread_local Machine* machine;

namespace {
constexpr size_t PAGE = 4096, STACK = 128 << 10;

void entry();

// A fiber gets a stack when it first runs and leaves it to others when it ends: threads that never wait share one,
// which stays in the cache.
void give_stack(Machine& m, Fiber& f) {
  if (!sanitizer::THREADS) {
    f.stack = m.free_stacks.back();
    m.free_stacks.pop_back();
  }
  // Stacks lie at multiples of 128 KB: without the shift all lanes' variables would share a few lines of the cache.
  u64 number = (f.stack - m.stacks) / STACK;
  void** sp = (void**)(f.stack + STACK - PAGE - 64 - number % 32 * 1088);
  *--sp = nullptr;
  *--sp = (void*)entry;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  f.sp = sp;
}

// Edges for the thread sanitizer: threads begin after `m.block` was released and end before `m.scheduler_sp` is acquired.
// One is not enough: a thread that begins late would come after all that have ended early.
void switch_to(Fiber& to) {
  Fiber& from = me();
  sanitizer::release(&machine->scheduler_sp);
  if (!to.sp) give_stack(*machine, to);
  sanitizer::leave_for(to, from.done ? nullptr : &from.fake_stack, STACK - PAGE);
  self = &to.thread;
  cuemu_switch(&from.sp, to.sp);
  sanitizer::arrived(from.fake_stack);
}

[[noreturn]] void leave_block() {
  Machine& m = *machine;
  sanitizer::release(&m.scheduler_sp);
  void* unused;
  sanitizer::leave_for_scheduler(m, nullptr);
  cuemu_switch(&unused, m.scheduler_sp);
  abort();
}

// The lowest set bit, counted from `from` on and around the end of the word.
u32 first_from(u32 bits, u32 from) {
  u32 turned = bits >> (from & 31) | bits << (-from & 31);
  return (__builtin_ctz(turned) + from) & 31;
}

// The fiber to run next, or null when none can.
Fiber* next_fiber(Machine& m) {
  u32 w = self ? self->warp : 0;
  bool elsewhere = m.shuffle && (m.next() & 15) == 0;
  if (elsewhere || !(m.warps_ready >> w & 1)) {
    if (!m.warps_ready) return nullptr;
    w = first_from(m.warps_ready, m.shuffle ? m.next() >> 32 : w);
  }
  Warp& warp = m.warps[w];
  u32 lane = m.shuffle ? first_from(warp.ready, m.next() >> 32) : __builtin_ctz(warp.ready);
  warp.ready &= ~(1u << lane);
  if (!warp.ready) m.warps_ready &= ~(1u << w);
  return &m.fibers[w * 32 + lane];
}

// What every stack runs: one thread after another.
void entry() {
  sanitizer::arrived(nullptr);
  Machine& m = *machine;
  for (;;) {
    sanitizer::acquire(&m.block);
    m.launch->kernel->entry(m.launch->args);
    Fiber& f = me();
    end_copies(f);
    f.done = true;
    m.alive--;
    Fiber* next = next_fiber(m);
    if (!next) leave_block();
    if (next->sp || sanitizer::THREADS) {
      if (!sanitizer::THREADS) m.free_stacks.push_back(f.stack);
      switch_to(*next);
    }
    next->stack = f.stack;
    next->sp = f.stack;
    self = &next->thread;
  }
}

// What AddressSanitizer holds against a range outlives munmap, and whoever is given the range next would be blamed.
void unmap(void* p, size_t bytes) {
  sanitizer::allow(p, bytes);
  munmap(p, bytes);
}

void make_stacks(Machine& m) {
  if (m.stacks_made < m.threads) {
    if (m.stacks) unmap(m.stacks, m.stacks_made * STACK);
    for (u32 i = 0; i < m.stacks_made; i++) sanitizer::destroy(m.fibers[i]);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    m.stacks = (u8*)mmap(nullptr, m.threads * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (m.stacks == MAP_FAILED) abort();
    m.stacks_made = m.threads;
    m.fibers.resize(m.threads);
    for (u32 i = 0; i < m.threads; i++) {
      mprotect(m.stacks + i * STACK, PAGE, PROT_NONE);
      sanitizer::create(m.fibers[i]);
    }
  }
  m.free_stacks.clear();
  for (u32 i = m.threads; i-- > 0;) {
    m.free_stacks.push_back(m.stacks + i * STACK + PAGE);
    if (sanitizer::THREADS) m.fibers[i].stack = m.free_stacks.back();
  }
}

void make_fiber(Machine& m, u32 t, Dim at) {
  Fiber& f = m.fibers[t];
  f.thread = {at, &m.block, t, t % 32, t / 32};
  f.sp = nullptr;
  f.site = {nullptr, 0};
  f.done = false;
  f.polled = nullptr;
  f.wrote = f.fenced = 0;
  f.fenced_all = false;
  f.saw = {};
}

// Shared memory ends where a page that faults begins. What its alignment leaves over, and a margin before it, is filled
// with NaN like the memory itself, and must still be so at the end of the block.
constexpr u32 SHARED_SPACE = 256 << 10, MARGIN = 256;
void make_shared(Machine& m) {
  if (!m.shared_end) {
    u8* space = (u8*)mmap(nullptr, SHARED_SPACE + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (space == MAP_FAILED) abort();
    m.shared_end = space + SHARED_SPACE;
    mprotect(m.shared_end, PAGE, PROT_NONE);
  }
  m.shared = m.shared_end - (m.shared_bytes + 1023) / 1024 * 1024;
  sanitizer::allow(m.shared - MARGIN, m.shared_end - m.shared + MARGIN);
  memset(m.shared - MARGIN, 0xFF, m.shared_end - m.shared + MARGIN);
  sanitizer::forbid(m.shared + m.shared_bytes, m.shared_end - m.shared - m.shared_bytes);
  sanitizer::forbid(m.shared - MARGIN, MARGIN);
}
// The first byte that is not 0xFF any more, or `end`.
const u8* first_written(const u8* begin, const u8* end) {
  return std::find_if(begin, end, [](u8 byte) { return byte != 0xFF; });
}
void check_shared(Machine& m) {
  sanitizer::allow(m.shared - MARGIN, m.shared_end - m.shared + MARGIN);
  const u8 *end = m.shared + m.shared_bytes, *before = first_written(m.shared - MARGIN, m.shared),
           *past = first_written(end, m.shared_end);
  if (before < m.shared) fail(NOWHERE, "shared memory was written %td bytes before its begin", m.shared - before);
  if (past < m.shared_end)
    fail(NOWHERE, "shared memory of %u bytes was written at byte %td", m.shared_bytes, past - m.shared);
}

void report_deadlock(Machine& m) {
  char text[900];
  int n = 0;
  Site last{nullptr, -1};
  for (u32 t = 0; t < m.threads && n < (int)sizeof text - 1; t++) {
    Fiber& f = m.fibers[t];
    if (f.site.file == last.file && f.site.line == last.line) continue;
    last = f.site;
    bool waits = m.warps[t / 32].barrier >> t % 32 & 1;
    n += snprintf(text + n, sizeof text - n, "%s from thread %u %s %s:%d", n ? ";" : "", t,
                  waits ? "at the barrier" : f.done ? "done, last at" : "at",
                  f.site.file ? base_name(f.site.file) : "its start", f.site.line);
  }
  self = nullptr;
  fail(NOWHERE, "deadlock, threads wait for ever:%s", text);
}
}  // namespace

Machine::~Machine() {
  for (u32 i = 0; i < stacks_made; i++) sanitizer::destroy(fibers[i]);
  if (stacks) unmap(stacks, stacks_made * STACK);
  if (shared_end) unmap(shared_end - SHARED_SPACE, SHARED_SPACE + PAGE);
}

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

namespace {
// A text that is cut where its memory ends.
struct Text {
  char* at;
  size_t left;
  __attribute__((format(printf, 2, 3))) void add(const char* format, ...) {
    va_list list;
    va_start(list, format);
    add(format, list);
    va_end(list);
  }
  void add(const char* format, va_list list) {
    size_t n = std::min<size_t>(vsnprintf(at, left, format, list), left - 1);
    at += n;
    left -= n;
  }
};
}  // namespace

void fail(Site site, const char* format, ...) {
  Machine& m = *machine;
  if (!m.failed) {
    Text text{m.error, sizeof m.error};
    Dim b = m.block.index;
    text.add("%s: ", m.launch->kernel->name);
    va_list list;
    va_start(list, format);
    text.add(format, list);
    va_end(list);
    if (site.file) text.add(" (%s:%d)", base_name(site.file), site.line);
    text.add(" [block %u,%u,%u", b.x, b.y, b.z);
    if (self) text.add(" thread %u", self->linear);
    text.add("]");
  }
  m.failed = true;
  if (m.held) std::exchange(m.held, nullptr)->clear(std::memory_order_release);
  if (self) leave_block();
}

void park() {
  Machine& m = *machine;
  Fiber* next = next_fiber(m);
  if (!next) leave_block();
  if (next != &me()) switch_to(*next);
}

void make_ready(Machine& m, u32 warp, u32 lanes) {
  if (!lanes) return;
  m.warps[warp].ready |= lanes;
  m.warps_ready |= 1u << warp;
}

void barrier(Site site) {
  Machine& m = *machine;
  Fiber& f = me();
  f.site = site;
  f.polls = 0;
  if (m.at_barrier == 0) m.barrier_site = site;
  else if (m.barrier_site.line != site.line || m.barrier_site.file != site.file)
    fail(site, "threads of the block wait at different barriers, others at %s:%d", base_name(m.barrier_site.file),
         m.barrier_site.line);
  if (m.shuffle && f.waited_copies < f.copies.size() && (m.next() & 3) == 0) perform_some_copies(f);
  char* edge = &m.edges[m.phase & 1];
  sanitizer::release(edge);
  if (++m.at_barrier == m.threads) {
    m.at_barrier = 0;
    m.phase++;
    for (u32 w = 0; w < m.warps.size(); w++) {
      make_ready(m, w, m.warps[w].barrier);
      m.warps[w].barrier = 0;
    }
  } else {
    m.warps[f.thread.warp].barrier |= 1u << f.thread.lane;
    park();
  }
  sanitizer::acquire(edge);
}

bool arrive(Warp& w, u32 mask, int kind, Site site) {
  Fiber& f = me();
  u32 bit = 1u << f.thread.lane;
  mask &= w.present;
  f.site = site;
  f.polls = 0;
  if (!(mask & bit))
    fail(site, "lane %u runs a collective whose mask 0x%x leaves it out", f.thread.lane, mask);
  if (!w.arrived) {
    w.kind = kind;
    w.mask = mask;
    w.site = site;
  } else if (w.kind != kind || w.mask != mask || w.site.line != site.line || w.site.file != site.file) {
    fail(site, "lanes of a warp disagree: others are at %s:%d", base_name(w.site.file), w.site.line);
  }
  w.arrived |= bit;
  return w.arrived == mask;
}

void dismiss(Warp& w) {
  u32 others = w.mask & ~(1u << self->lane);
  w.arrived = 0;
  make_ready(*machine, self->warp, others);
}

void warp_barrier(u32 mask, Site site) {
  Warp& w = machine->warps[self->warp];
  char* edge = &w.edges[w.syncs & 1];
  sanitizer::release(edge);
  if (arrive(w, mask, 1, site)) {
    w.syncs++;
    dismiss(w);
  } else {
    park();
  }
  sanitizer::acquire(edge);
}

u8* shared_memory() { return machine->shared; }

bool run_block(Machine& m, u32 index) {
  Launch& l = *m.launch;
  m.block = {{index % l.grid.x, index / l.grid.x % l.grid.y, index / l.grid.x / l.grid.y}, l.block, l.grid};
  m.block_index = index;
  m.threads = m.alive = l.threads;
  m.shared_bytes = l.shared_bytes;
  m.at_barrier = 0;
  m.shuffle = l.seed != 0;
  m.random = (l.seed + index) * 0x9E3779B97F4A7C15ull | 1;
  m.blocks_begun++;
  make_stacks(m);
  make_shared(m);
  begin_block(m);
  m.warps.resize((m.threads + 31) / 32);
  m.warps_ready = 0;
  for (u32 w = 0; w < m.warps.size(); w++) {
    u32 lanes = std::min(32u, m.threads - w * 32);
    m.warps[w].present = lanes == 32 ? ~0u : (1u << lanes) - 1;
    m.warps[w].ready = m.warps[w].barrier = m.warps[w].arrived = 0;
    make_ready(m, w, m.warps[w].present);
  }
  u32 t = 0;
  for (u32 z = 0; z < l.block.z; z++)
    for (u32 y = 0; y < l.block.y; y++)
      for (u32 x = 0; x < l.block.x; x++) make_fiber(m, t++, {x, y, z});
  sanitizer::allow(m.stacks, m.stacks_made * STACK);
  sanitizer::enter(m);
  self = nullptr;
  Fiber& first = *next_fiber(m);
  give_stack(m, first);
  sanitizer::release(&m.block);
  sanitizer::leave_for(first, &m.fake_stack, STACK - PAGE);
  self = &first.thread;
  cuemu_switch(&m.scheduler_sp, first.sp);
  sanitizer::arrived(m.fake_stack);
  sanitizer::acquire(&m.scheduler_sp);
  self = nullptr;
  if (m.alive && !m.failed) report_deadlock(m);
  if (m.failed)
    for (Fiber& f : m.fibers) forget_copies(f);
  if (!m.failed && m.shared_bytes) check_shared(m);
  return !m.failed;
}
}  // namespace cuemu
