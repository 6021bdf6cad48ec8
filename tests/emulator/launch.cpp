// Launches: blocks over host threads, reports, and the list of kernels.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <numeric>
#include <thread>
#include <time.h>
#include <unistd.h>

#include "memory.hpp"
#include "sanitizer.hpp"

namespace cuemu {
namespace {
Kernel* kernels = nullptr;

struct Run {
  Launch launch;
  u32 step, start;  // the i-th block to run is start + i step, modulo their number
  std::atomic<u32> next{0};
  std::mutex lock;
  u32 failed_at = ~0u;
  char* error;
  u64 error_bytes;
};

// A kernel that follows a bad pointer fails like any other.
void on_fault(int signal_number, siginfo_t* info, void*) {
  if (!machine || !self) {
    signal(signal_number, SIG_DFL);
    return;
  }
  u8 *p = (u8*)info->si_addr, *stack = me().stack;
  if (p < stack && p + 4096 >= stack) fail(NOWHERE, "stack overflow: local variables take more than 120 KB");
  else if (machine->shared_end && p >= machine->shared_end && p < machine->shared_end + 4096)
    fail(NOWHERE, "shared memory of %u bytes was used at byte %td", machine->shared_bytes, p - machine->shared);
  else fail(NOWHERE, "illegal address %p", p);
}

// Ends a block that computes for ever without a barrier or a load: a timer of the thread's own CPU time.
class Watchdog {
 public:
  explicit Watchdog(u32 seconds) {
    sigevent event{};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGVTALRM;
    event._sigev_un._tid = gettid();
    armed = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
    itimerspec every{{seconds, 0}, {seconds, 0}};
    if (armed) timer_settime(timer, 0, &every, nullptr);
  }
  ~Watchdog() {
    if (armed) timer_delete(timer);
  }
  // The block that runs at one tick may have begun just before; the one that also runs at the next has not.
  static void on_tick(int) {
    if (!machine || !self) return;
    if (std::exchange(machine->block_at_tick, machine->blocks_begun) != machine->blocks_begun) return;
    fail(NOWHERE, "the block has run for %u s: does it wait for something that never comes?", machine->launch->patience);
  }

 private:
  timer_t timer;
  bool armed;
};

void run_blocks(Run& run, Machine& m) {
  alignas(16) static thread_local u8 alternate[64 << 10];
  stack_t stack{}, old_stack{};
  stack.ss_sp = alternate;
  stack.ss_size = sizeof alternate;
  sigaltstack(&stack, &old_stack);
  machine = &m;
  m.launch = &run.launch;
  Watchdog watchdog(run.launch.patience);
  m.failed = false;
  for (u32 i; (i = run.next++) < run.launch.blocks;) {
    if (run_block(m, (run.start + (u64)i * run.step) % run.launch.blocks)) continue;
    run.next = run.launch.blocks;
    std::lock_guard<std::mutex> guard(run.lock);
    if (i < run.failed_at) {
      run.failed_at = i;
      snprintf(run.error, run.error_bytes, "%s", m.error);
    }
    break;
  }
  machine = nullptr;
  sigaltstack(&old_stack, nullptr);
}
}  // namespace

Kernel::Kernel(const char* name, Entry entry, unsigned args_bytes, unsigned max_threads)
    : name(name), entry(entry), args_bytes(args_bytes), max_threads(max_threads), next(kernels) {
  kernels = this;
}
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

// Bytes of arguments and threads a block that a kernel takes.
extern "C" void cuemu_limits(const Kernel* kernel, u32* args_bytes, u32* max_threads) {
  *args_bytes = kernel->args_bytes;
  *max_threads = kernel->max_threads;
}

// Runs a launch on at most `host_threads` threads; a block may take `patience` seconds of each. 0, or 1 with a sentence
// in `error`.
extern "C" int cuemu_launch(Device* device, const Kernel* kernel, const u32* grid, u32 threads, u32 shared_bytes,
                            const void* args, u64 seed, u32 host_threads, u32 patience, char* error, u64 error_bytes) {
  Run run;
  Launch& launch = run.launch;
  launch.device = device;
  launch.kernel = kernel;
  launch.args = args;
  launch.grid = {grid[0], grid[1], grid[2]};
  launch.block = {threads, 1, 1};
  launch.threads = threads;
  launch.shared_bytes = shared_bytes;
  launch.seed = seed;
  launch.patience = patience;
  launch.blocks = grid[0] * grid[1] * grid[2];
  launch.first_mark = device->shadow.begin_launch();
  run.step = 1;
  run.start = 0;
  run.error = error;
  run.error_bytes = error_bytes;
  if (seed && run.launch.blocks > 1) {
    u64 random = seed * 0x9E3779B97F4A7C15ull;
    run.start = (random >> 33) % run.launch.blocks;
    do {
      random = random * 0x5851F42D4C957F2Dull + 0x14057B7EF767814Full;
      run.step = 1 + (random >> 33) % (run.launch.blocks - 1);
    } while (std::gcd(run.step, run.launch.blocks) != 1);
  }
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  action.sa_handler = Watchdog::on_tick;
  action.sa_flags = SA_ONSTACK | SA_NODEFER | SA_RESTART;
  sigaction(SIGVTALRM, &action, nullptr);
  host_threads = std::max(1u, std::min(host_threads, run.launch.blocks));
  launch.parallel = host_threads > 1;
  while (device->machines.size() < host_threads) device->machines.push_back(new Machine);
  for (Machine* m : device->machines) m->begin_launch(launch.first_mark);
  std::vector<std::thread> others;
  for (u32 i = 1; i < host_threads; i++)
    others.emplace_back([&run, m = device->machines[i]] { run_blocks(run, *m); });
  run_blocks(run, *device->machines[0]);
  for (std::thread& other : others) other.join();
  for (Machine* m : device->machines) {
    device->ldmatrix_phases += std::exchange(m->ldmatrix_phases, 0);
    device->ldmatrix_wavefronts += std::exchange(m->ldmatrix_wavefronts, 0);
  }
  return run.failed_at != ~0u;
}

// Groups of 8 rows that ldmatrix has read since the last call, and the passes over the banks that they took.
extern "C" void cuemu_bank_conflicts(Device* device, u64* requests, u64* wavefronts) {
  *requests = std::exchange(device->ldmatrix_phases, 0);
  *wavefronts = std::exchange(device->ldmatrix_wavefronts, 0);
}
