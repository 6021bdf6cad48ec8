// What the parts of the emulator share: fibers, warps, the block a host thread runs, and the launch it belongs to.
//
// scheduler.cpp     fibers of a block, barriers, warp collectives
// instructions.cpp  shuffles, ldmatrix, mma, cp.async
// memory.cpp        device memory
// shadow.cpp        checks of every access to it: bounds, races between blocks
// order.cpp         which block happened before which: fences and atomics
// launch.cpp        blocks over host threads, reports, and what Rust calls
#pragma once
#include <atomic>
#include <mutex>
#include <vector>

#define ELEM 32
#include "ptx.cuh"
#include "order.hpp"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace cuemu {

struct Launch;
struct Device;
typedef i32 Mark;  // of an access, in the shadow of device memory

// One 16-byte cp.async; `from` is null where zeros are written.
struct Copy {
  u8* to;
  const u8* from;
  bool done;
};

// A CUDA thread. `self` points to its first member.
struct Fiber {
  Thread thread;
  void* sp = nullptr;     // null until it first runs
  u8* stack = nullptr;  // its lowest byte
  Site site{};          // where it waits or waited last
  bool done = false;
  // Copies in the order they were issued, and where each committed group ends.
  std::vector<Copy> copies;
  std::vector<u32> groups;
  u32 waited_copies = 0, waited_groups = 0;
  // Spinning: how often the same word was read with nothing between.
  const void* polled = nullptr;
  u32 polls = 0;
  // One more than the barriers passed at its last store and at its last fence; whether no store came after that.
  u32 wrote = 0, fenced = 0;
  bool fenced_all = false;
  Order::Acquired saw;  // what its last atomic acquires if a fence follows
  void* tsan = nullptr;
  void* fake_stack = nullptr;
};

// What a lane hands over in a collective; the last lane to arrive acts for all.
struct Slot {
  const void* in;
  const void* in2;
  void* out;
  u32 value;
};

struct Warp {
  u32 present = 0;  // lanes there are
  u32 ready = 0;    // lanes that could run but do not
  u32 barrier = 0;  // lanes that wait at the block's barrier
  // The collective under way.
  u32 arrived = 0, mask = 0;
  int kind = 0;
  Site site{};
  u32 syncs = 0;  // collectives that are barriers
  char edges[2];  // between one of them and its lanes, for the thread sanitizer
  Slot slot[32];
};

// A line of the kernel that this block has run, and its mark.
struct KnownLine {
  Site site;
  bool atomic;
  Mark mark = 0;
};

// Blocks one after another on one host thread.
struct Machine {
  Launch* launch = nullptr;
  Block block{};      // what the block's threads see as blockIdx, blockDim, gridDim
  u32 block_index = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  u32 threads = 0, alive = 0;
  u32 warps_ready = 0;  // a bit for each warp with a ready lane
  u32 at_barrier = 0;
  u32 phase = 0;  // barriers passed
  char edges[2];  // as in Warp: while slow threads leave one barrier, fast ones may have come to the next
  Site barrier_site{};
  void* scheduler_sp = nullptr;
  u8* stacks = nullptr;
  u32 stacks_made = 0;
  std::vector<u8*> free_stacks;
  u8* shared_end = nullptr;  // a page that faults begins here
  u8* shared = nullptr;
  u32 shared_bytes = 0;
  u64 random = 0;
  bool shuffle = false;
  bool failed = false;
  std::atomic_flag* held = nullptr;  // a lock on groups of the shadow, which `fail` opens
  char error[1024];
  // Races between blocks; see shadow.cpp. Marks from `first_mine` to `next_mark` are of this block; lines known by a
  // mark less than `first_valid` are of another block or an earlier time.
  KnownLine lines[256];
  Mark first_mine = 0, first_valid = 0, next_mark = 0, end_mark = 0;
  u32 clock = 1;
  bool any_fence = false;
  std::unordered_map<u32, u32> seen;  // other blocks' clocks, if `seen_known`
  bool seen_known = false;
  u64 ldmatrix_phases = 0, ldmatrix_wavefronts = 0;
  u64 blocks_begun = 0, block_at_tick = 0;  // for the watchdog
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;

  ~Machine();
  Device& device();
  void begin_launch(Mark first_mark);
  u64 next() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }
};

// One launch, over all host threads that run its blocks.
struct Launch {
  Device* device;
  const Kernel* kernel;
  const void* args;
  Dim grid, block;
  bool parallel = false;  // blocks run on several host threads
  u32 threads, shared_bytes;
  u64 seed;
  u32 patience;  // seconds that a block may take
  u32 blocks;
  Mark first_mark = 0;  // in the shadow of device memory
  Order order;
};

extern constinit thread_local Machine* machine;  // null outside a launch

inline Fiber& me() { return *(Fiber*)self; }

// scheduler.cpp
bool run_block(Machine& m, u32 index);
// Lets another fiber run; returns when somebody has made this one ready.
void park();
void make_ready(Machine& m, u32 warp, u32 lanes);
// Counts the calling lane in. True for the last lane of the mask: it acts, then calls `dismiss`. The others park.
bool arrive(Warp& w, u32 mask, int kind, Site site);
void dismiss(Warp& w);

// instructions.cpp
void perform(const Copy& copy);
void perform_some_copies(Fiber& f);
// When the thread ends: it must have waited for all of them.
void end_copies(Fiber& f);
void forget_copies(Fiber& f);

const char* base_name(const char* path);
}  // namespace cuemu
