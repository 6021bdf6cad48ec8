// Device memory: one range of addresses a device, allocations with pages between them that fault; and its shadow.
#pragma once
#include <map>

#include "machine.hpp"

namespace cuemu {

// A range of host addresses that is reserved at once and becomes real page by page.
struct Range {
  u8* begin = nullptr;
  u64 bytes = 0;
  bool reserve(u64 size, bool usable);
  ~Range();
};

// A line of a kernel that touches device memory, run by one block at one time of its clock.
struct Access {
  Site site;
  bool atomic;
  u32 block, clock;
};

// The last write and the first read of a group of 4 bytes, or of one byte.
struct Cell {
  Mark written, read;
};

// A cell for each group of device memory and, where groups are split, for each byte; see shadow.cpp.
struct Shadow {
  static constexpr u32 CHUNK = 64, SEGMENT = 1 << 16, LAST = 0x3FFFFFFF - CHUNK, SEGMENTS = (LAST >> 16) + 2;
  Range cells;     // groups, then bytes
  u64 split = 0;   // where bytes begin
  Range segments;  // pointers to the accesses of this launch, SEGMENT of them each
  std::atomic<u32> next{CHUNK};
  u32 first = 0;  // of this launch
  std::mutex lock;

  bool reserve(u64 memory);
  ~Shadow();
  Cell* groups() { return (Cell*)cells.begin; }
  Cell* bytes() { return (Cell*)cells.begin + split; }
  Access** table() { return (Access**)segments.begin; }
  Access& access(Mark mark) {
    u32 i = mark / 2 - first;
    return table()[i / SEGMENT][i % SEGMENT];
  }
  // The first mark of a new launch, which no access gets: all of earlier launches are smaller.
  Mark begin_launch();
  // The mark of a new access.
  Mark number(Machine& m, const Access& access);
};

// Device memory is live in units of this many bytes, of which the first few may be used.
constexpr u64 UNIT = 256;

struct Device {
  Range memory;
  std::map<u8*, u64> unused;  // of `memory`, by address
  std::map<u8*, u64> blocks;  // what was allocated
  u64 left = 0;               // bytes that may still be allocated
  Range live;                 // a u16 for each unit: how many of its bytes may be used
  Shadow shadow;
  std::vector<Machine*> machines;
  u64 ldmatrix_phases = 0, ldmatrix_wavefronts = 0;
  ~Device();
};

inline u32 live_at(const Device& d, u64 offset) { return ((const u16*)d.live.begin)[offset / UNIT]; }
inline Device& Machine::device() { return *launch->device; }

// Called when a block starts.
void begin_block(Machine& m);
}  // namespace cuemu
