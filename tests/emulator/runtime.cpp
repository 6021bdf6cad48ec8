// The emulator's machine: schedules the fibers of a block and executes the instructions that threads do together.
//
// A launch runs its blocks one after another on fresh fibers. Fibers switch only where CUDA threads wait for each
// other (barrier, warp collective, copy wait), in an order that the seed shuffles.
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <immintrin.h>
#include <sys/mman.h>
#include <vector>

#define ELEM 32
#include "ptx.cuh"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

// Saves the callee-saved registers and the stack pointer of one fiber and takes up another.
extern "C" void cuemu_switch(void** save, void* to);
asm(R"(.text
.globl cuemu_switch
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
namespace {

constexpr size_t STACK = 256 << 10;
enum class State { Ready, Barrier, Collective, Done };

struct Copy {
  u8* to;
  const u8* from;
};

struct Fiber {
  Thread thread;
  void* sp;
  u8* stack = nullptr;
  State state;
  Site site;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  u32 arrived = 0, wanted = 0, mask = 0;
  int kind = 0;
  Site site{};
  u32 parity = 0;
  alignas(64) u8 in[2][32 * SLOT];
  alignas(64) u8 out[2][32 * SLOT];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  void* scheduler_sp = nullptr;
  u32 threads = 0, alive = 0, at_barrier = 0;
  u8* shared = nullptr;
  u32 shared_bytes = 0;
  u64 random = 0;
  bool shuffle = false;
  const Kernel* kernel = nullptr;
  const void* args = nullptr;
  jmp_buf bail;
  char* error = nullptr;
  size_t error_bytes = 0;
  bool running = false;

  u64 next() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }
};
thread_local Machine machine;
Kernel* kernels = nullptr;

Fiber& me() { return *(Fiber*)self; }

void to_scheduler() { cuemu_switch(&me().sp, machine.scheduler_sp); }

void entry() {
  machine.kernel->entry(machine.args);
  me().state = State::Done;
  machine.alive--;
  to_scheduler();
  abort();
}

void resume(Fiber& f) {
  self = &f.thread;
  cuemu_switch(&machine.scheduler_sp, f.sp);
}

void perform(const Copy& c) {
  if (c.from) memcpy(c.to, c.from, 16);
  else memset(c.to, 0, 16);
}
}  // namespace

thread_local Thread* self;

Kernel::Kernel(const char* name, Entry entry, unsigned args_bytes, unsigned max_threads)
    : name(name), entry(entry), args_bytes(args_bytes), max_threads(max_threads), next(kernels) {
  kernels = this;
}

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  int n = snprintf(machine.error, machine.error_bytes, "%s: ", machine.kernel->name);
  n += vsnprintf(machine.error + n, machine.error_bytes - n, format, list);
  va_end(list);
  if (self)
    snprintf(machine.error + n, machine.error_bytes - n, " [block %u,%u,%u thread %u]", self->block.x, self->block.y,
             self->block.z, self->linear);
  longjmp(machine.bail, 1);
}

void barrier(Site site) {
  Fiber& f = me();
  f.site = site;
  if (++machine.at_barrier == machine.threads) {
    machine.at_barrier = 0;
    for (u32 i = 0; i < machine.threads; i++)
      if (machine.fibers[i].state == State::Barrier) machine.fibers[i].state = State::Ready;
  } else {
    f.state = State::Barrier;
    to_scheduler();
  }
}

Exchange collective(u32 mask, int kind, const void* deposit, u32 bytes, Together together, Site site) {
  Fiber& f = me();
  Warp& w = machine.warps[f.thread.warp];
  u32 lane = f.thread.lane, first = f.thread.warp * 32, present = std::min(32u, machine.threads - first);
  if (present < 32) mask &= (1u << present) - 1;
  if (!(mask >> lane & 1))
    fail("lane %u runs a collective whose mask 0x%x leaves it out (%s:%d)", lane, mask, site.file, site.line);
  if (w.arrived == 0) {
    w.kind = kind;
    w.mask = mask;
    w.site = site;
    w.wanted = __builtin_popcount(mask);
  } else if (w.kind != kind || w.mask != mask || w.site.line != site.line) {
    fail("lanes of a warp disagree: one is at %s:%d, another at %s:%d", w.site.file, w.site.line, site.file, site.line);
  }
  u32 p = w.parity;
  if (bytes) memcpy(w.in[p] + SLOT * lane, deposit, bytes);
  f.site = site;
  if (++w.arrived == w.wanted) {
    w.arrived = 0;
    w.parity ^= 1;
    if (together) together(w.in[p], w.out[p], mask);
    for (u32 i = 0; i < present; i++)
      if (mask >> i & 1 && machine.fibers[first + i].state == State::Collective)
        machine.fibers[first + i].state = State::Ready;
  } else {
    f.state = State::Collective;
    to_scheduler();
  }
  return {w.in[p], w.out[p]};
}

u8* shared_memory() { return machine.shared; }

static void check_aligned(const void* p, u32 bytes, const char* what, Site site) {
  u32 unit = bytes & (~bytes + 1);
  if ((uintptr_t)p % std::min(unit, 16u)) fail("misaligned %s of %u bytes at %p (%s:%d)", what, bytes, p, site.file, site.line);
}
void on_load(const void* p, u32 bytes, Site site) { check_aligned(p, bytes, "load", site); }
void on_store(const void* p, u32 bytes, Site site) { check_aligned(p, bytes, "store", site); }
u32 fetch_add(u32* p, u32 v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
u32 fetch_or(u32* p, u32 v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
u32 fetch_inc(u32* p, u32 limit) {
  u32 old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}
void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// A copy happens at once or as late as the wait allows; both are legal, and a kernel must not notice.
void copy_async(void* to, const void* from, bool valid, Site site) {
  if ((uintptr_t)to % 16 || (valid && (uintptr_t)from % 16)) fail("misaligned cp.async (%s:%d)", site.file, site.line);
  Copy c{(u8*)to, valid ? (const u8*)from : nullptr};
  if (machine.shuffle && machine.next() & 1) perform(c);
  else me().open.push_back(c);
}
void copy_commit() {
  me().groups.push_back(std::move(me().open));
  me().open.clear();
}
void copy_wait(int groups) {
  auto& list = me().groups;
  while ((int)list.size() > groups) {
    for (const Copy& c : list.front()) perform(c);
    list.erase(list.begin());
  }
}

void ldmatrix(u32* r, int matrices, bool trans, const void* row, Site site) {
  if ((uintptr_t)row % 16) fail("ldmatrix row at %p is not a multiple of 16 (%s:%d)", row, site.file, site.line);
  u32 lane = self->lane;
  u8 bytes[16] = {};
  if ((int)lane < 8 * matrices) memcpy(bytes, row, 16);
  Exchange x = collective(~0u, 3, bytes, 16, nullptr, site);
  for (int m = 0; m < matrices; m++) {
    u16 pair[2];
    for (u32 e = 0; e < 2; e++) {
      u32 i = lane / 4, j = lane % 4 * 2 + e;
      if (trans) std::swap(i, j);
      memcpy(&pair[e], x.in + SLOT * (8 * m + i) + 2 * j, 2);
    }
    memcpy(&r[m], pair, 4);
  }
}

float to_f32(u16 bits) { return _cvtsh_ss(bits); }
u16 to_f16(float v) { return _cvtss_sh(v, 0); }

namespace {
struct Operands {
  u32 a[4], b[2];
  float d[4];
};

__attribute__((target("avx512f,avx512bw,avx512vl,f16c,fma"))) void multiply(const u8* in, u8* out, u32) {
  alignas(64) u16 a[16][16], b[8][16];
  alignas(64) float bt[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Operands* s = (const Operands*)(in + SLOT * lane);
    int g = lane / 4, t = lane % 4 * 2;
    memcpy(&a[g][t], &s->a[0], 4);
    memcpy(&a[g + 8][t], &s->a[1], 4);
    memcpy(&a[g][t + 8], &s->a[2], 4);
    memcpy(&a[g + 8][t + 8], &s->a[3], 4);
    memcpy(&b[g][t], &s->b[0], 4);
    memcpy(&b[g][t + 8], &s->b[1], 4);
  }
  for (int n = 0; n < 8; n++) {
    alignas(64) float row[16];
    _mm512_store_ps(row, _mm512_cvtph_ps(*(const __m256i*)b[n]));
    for (int k = 0; k < 16; k++) bt[k][n] = row[k];
  }
  for (int m = 0; m < 16; m++) {
    alignas(64) float row[16];
    _mm512_store_ps(row, _mm512_cvtph_ps(*(const __m256i*)a[m]));
    __m256 sum = _mm256_setzero_ps();
    for (int k = 0; k < 16; k++) sum = _mm256_fmadd_ps(_mm256_set1_ps(row[k]), _mm256_load_ps(bt[k]), sum);
    alignas(32) float r[8];
    _mm256_store_ps(r, sum);
    for (int t = 0; t < 4; t++) {
      int lane = m % 8 * 4 + t;
      const Operands* s = (const Operands*)(in + SLOT * lane);
      float* d = (float*)(out + SLOT * lane);
      d[2 * (m / 8)] = s->d[2 * (m / 8)] + r[2 * t];
      d[2 * (m / 8) + 1] = s->d[2 * (m / 8) + 1] + r[2 * t + 1];
    }
  }
}
}  // namespace

void mma_m16n8k16(float* d, const u32* a, const u32* b, Site site) {
  Operands s;
  memcpy(s.a, a, 16);
  memcpy(s.b, b, 8);
  memcpy(s.d, d, 16);
  Exchange x = collective(~0u, 4, &s, sizeof s, multiply, site);
  memcpy(d, x.out + SLOT * self->lane, 16);
}

namespace {
void segv(int, siginfo_t* info, void*) {
  if (!machine.running) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  fail("illegal address %p", info->si_addr);
}

void report_deadlock(Dim block) {
  int n = snprintf(machine.error, machine.error_bytes, "%s: deadlock in block %u,%u,%u:", machine.kernel->name, block.x,
                   block.y, block.z);
  Site last{nullptr, -1};
  for (u32 t = 0; t < machine.threads && n < (int)machine.error_bytes - 1; t++) {
    Fiber& f = machine.fibers[t];
    if (f.site.file == last.file && f.site.line == last.line) continue;
    last = f.site;
    const char* where = f.state == State::Barrier ? "at barrier" : f.state == State::Done ? "done, last at" : "at";
    n += snprintf(machine.error + n, machine.error_bytes - n, " from thread %u %s %s:%d;", t, where,
                  f.site.file ? f.site.file : "its start", f.site.line);
  }
}

bool run_block(Dim block, Dim block_dim, Dim grid_dim) {
  Machine& m = machine;
  memset(m.shared, 0xFF, m.shared_bytes);
  m.alive = m.threads;
  m.at_barrier = 0;
  for (Warp& w : m.warps) w.arrived = 0;
  for (u32 t = 0; t < m.threads; t++) {
    Fiber& f = m.fibers[t];
    Dim thread{t % block_dim.x, t / block_dim.x % block_dim.y, t / block_dim.x / block_dim.y};
    f.thread = {thread, block, block_dim, grid_dim, t, t % 32, t / 32};
    f.state = State::Ready;
    f.site = {nullptr, 0};
    f.open.clear();
    f.groups.clear();
    void** sp = (void**)(f.stack + STACK - 64);
    *--sp = nullptr;
    *--sp = (void*)entry;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f.sp = sp;
  }
  std::vector<u32> order(m.warps.size());
  for (u32 i = 0; i < order.size(); i++) order[i] = i;
  u32 lanes[32];
  for (u32 i = 0; i < 32; i++) lanes[i] = i;
  while (m.alive) {
    bool progress = false;
    if (m.shuffle)
      for (u32 i = order.size(); i > 1; i--) std::swap(order[i - 1], order[m.next() % i]);
    for (u32 w : order) {
      u32 present = std::min(32u, m.threads - w * 32);
      for (bool again = true; again;) {
        again = false;
        if (m.shuffle)
          for (u32 i = 31; i > 0; i--) std::swap(lanes[i], lanes[m.next() % (i + 1)]);
        for (u32 lane : lanes) {
          if (lane >= present) continue;
          Fiber& f = m.fibers[w * 32 + lane];
          if (f.state != State::Ready) continue;
          resume(f);
          progress = true;
        }
        for (u32 lane = 0; lane < present; lane++) again |= m.fibers[w * 32 + lane].state == State::Ready;
        if (again && m.shuffle && m.next() % 4 == 0) break;
      }
    }
    if (!progress && m.alive) {
      report_deadlock(block);
      return false;
    }
  }
  return true;
}
}  // namespace
}  // namespace cuemu

using namespace cuemu;

// The kernel of this name (with its suffix), or null.
extern "C" const Kernel* cuemu_find(const char* name) {
  for (Kernel* k = kernels; k; k = k->next)
    if (!strcmp(k->name, name)) return k;
  return nullptr;
}

// Name of the i-th kernel, or null past the end.
extern "C" const char* cuemu_name(size_t i) {
  Kernel* k = kernels;
  while (k && i--) k = k->next;
  return k ? k->name : nullptr;
}

// Runs a launch. 0, or 1 with a sentence in `error`.
extern "C" int cuemu_launch(const Kernel* kernel, const u32* grid, const u32* block, u32 shared_bytes, const void* args,
                            u64 args_bytes, u64 seed, char* error, u64 error_bytes) {
  Machine& m = machine;
  m.kernel = kernel;
  m.args = args;
  m.error = error;
  m.error_bytes = error_bytes;
  m.threads = block[0] * block[1] * block[2];
  m.shared_bytes = shared_bytes;
  m.shuffle = seed != 0;
  m.random = seed * 0x9E3779B97F4A7C15ull + 1;
  if (args_bytes != kernel->args_bytes || m.threads == 0 || m.threads > kernel->max_threads || shared_bytes > 227 << 10) {
    snprintf(error, error_bytes, "%s: bad launch: %llu bytes of arguments for %u, %u threads of %u, %u bytes of shared memory",
             kernel->name, args_bytes, kernel->args_bytes, m.threads, kernel->max_threads, shared_bytes);
    return 1;
  }
  static thread_local u8 alternate[65536];
  stack_t stack{};
  stack.ss_sp = alternate;
  stack.ss_size = sizeof alternate;
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = segv;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  size_t had = m.fibers.size();
  if (had < m.threads) m.fibers.resize(m.threads);
  for (size_t i = had; i < m.fibers.size(); i++)
    m.fibers[i].stack = (u8*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  m.warps.resize((m.threads + 31) / 32);
  u8* shared = (u8*)aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024 + 1024);
  m.shared = shared;
  volatile int failed = 0;
  m.running = true;
  self = nullptr;
  if (setjmp(m.bail) == 0) {
    Dim grid_dim{grid[0], grid[1], grid[2]}, block_dim{block[0], block[1], block[2]};
    for (u32 z = 0; z < grid[2] && !failed; z++)
      for (u32 y = 0; y < grid[1] && !failed; y++)
        for (u32 x = 0; x < grid[0] && !failed; x++) failed = !run_block({x, y, z}, block_dim, grid_dim);
  } else {
    failed = 1;
  }
  m.running = false;
  self = nullptr;
  free(shared);
  return failed;
}

constexpr size_t PAGE = 4096;
// Device memory: filled with NaN, a page that faults on both sides, the end at the far page.
extern "C" void* cuemu_alloc(u64 bytes) {
  size_t size = (bytes + PAGE - 1) / PAGE * PAGE;
  u8* m = (u8*)mmap(nullptr, size + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (m == MAP_FAILED) return nullptr;
  mprotect(m, PAGE, PROT_NONE);
  mprotect(m + PAGE + size, PAGE, PROT_NONE);
  u8* p = m + PAGE + size - (bytes + 15) / 16 * 16;
  memset(p, 0xFF, bytes);
  return p;
}
extern "C" void cuemu_free(void* p, u64 bytes) {
  size_t size = (bytes + PAGE - 1) / PAGE * PAGE;
  munmap((u8*)p + (bytes + 15) / 16 * 16 - size - PAGE, size + 2 * PAGE);
}
