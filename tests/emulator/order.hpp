// Which blocks of a launch happened before which: an atomic after a fence releases what its block wrote, an atomic
// before a fence acquires what others released at the same address. This is how `last_block` of ptx.cuh may read the
// others' partial sums; nothing else orders two blocks.
//
// A block's time is a clock that a release advances. Every counter keeps a log of releases, and every block the length
// of the log that it acquired; what a block has seen is collected from there, through other blocks' acquisitions too,
// when it first touches what another block wrote. So a block that is not the last one pays for two entries only.
#pragma once
#include <mutex>
#include <unordered_map>
#include <vector>

namespace cuemu {

struct Order {
  static constexpr u32 NONE = ~0u;
  struct Release {
    u32 block, clock;
    u32 acquired;  // how many entries the block had in `acquired` then
  };
  struct Acquired {
    u32 counter = NONE, releases = 0;
  };
  std::mutex lock;
  std::unordered_map<const void*, u32> numbers;
  std::vector<std::vector<Release>> counters;
  std::unordered_map<u32, std::vector<Acquired>> acquired;

  // What an atomic at `p` would acquire, after entering the release of `block`, if it releases. Needs the lock.
  Acquired enter(const void* p, bool releases, u32 block, u32 clock);
  void acquire(u32 block, Acquired what);
  // For every block that `block` has seen released: the clock up to which it has.
  std::unordered_map<u32, u32> seen_by(u32 block);
};
}  // namespace cuemu
