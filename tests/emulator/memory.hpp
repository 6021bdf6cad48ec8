// Device memory: one range of addresses a device, allocations with pages between them that fault.
#pragma once
#include <map>

#include "machine.hpp"

namespace cuemu {

// A host range that is reserved at once and becomes real page by page.
struct Range {
  u8* begin = nullptr;
  u64 bytes = 0;
  bool reserve(u64 size, bool usable);
  ~Range();
};

struct Device {
  Range memory;
  std::map<u8*, u64> unused;  // of `memory`, by address
  std::map<u8*, u64> blocks;  // what was allocated
  u64 left = 0;               // bytes that may still be allocated
  Range live;                 // a u16 for each unit of 256 bytes: how many of them may be used
  std::vector<Machine*> machines;
  std::atomic<u64> ldmatrix_phases{0}, ldmatrix_wavefronts{0};
  ~Device();
};

// A thread that reads one word so often with nothing between waits for another block.
constexpr u32 SPIN = 1 << 20;

// Called when a block starts.
void begin_block(Machine& m);
}  // namespace cuemu
