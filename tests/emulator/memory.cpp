// Device memory: allocations, and which of their bytes may be used.
#include "memory.hpp"

#include <algorithm>
#include <cstdio>
#include <sys/mman.h>

namespace cuemu {
namespace {
constexpr u64 PAGE = 4096;

u64 pages(u64 bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// Says which bytes of [p, p + bytes) may be used: the first `usable`.
void set_live(Device& d, const u8* p, u64 bytes, u64 usable) {
  u16* live = (u16*)d.live.begin + (p - d.memory.begin) / UNIT;
  for (u64 at = 0; at < bytes; at += UNIT) *live++ = at < usable ? std::min(UNIT, usable - at) : 0;
}
}  // namespace

bool Range::reserve(u64 size, bool usable) {
  int protection = usable ? PROT_READ | PROT_WRITE : PROT_NONE;
  void* p = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return false;
  begin = (u8*)p;
  bytes = size;
  return true;
}
Range::~Range() {
  if (begin) munmap(begin, bytes);
}

Device::~Device() {
  for (Machine* m : machines) delete m;
}

}  // namespace cuemu

using namespace cuemu;

// A device with this much memory, or null when the system has no address space for it.
extern "C" Device* cuemu_device(u64 memory) {
  Device* d = new Device;
  u64 space = pages(memory) * 2;
  if (!d->memory.reserve(space, false) || !d->live.reserve(space / UNIT * 2, true) || !d->shadow.reserve(space)) {
    delete d;
    return nullptr;
  }
  d->unused[d->memory.begin] = space;
  d->left = memory;
  return d;
}
extern "C" void cuemu_device_drop(Device* d) { delete d; }

// Memory that ends where a page that faults begins, filled with NaN; null where the device has not so much left.
extern "C" void* cuemu_allocate(Device* d, u64 bytes) {
  bytes = std::max<u64>(UNIT, (bytes + UNIT - 1) / UNIT * UNIT);
  u64 size = pages(bytes);
  if (size > d->left) return nullptr;
  for (auto& [begin, room] : d->unused) {
    if (room < size + PAGE) continue;
    u8* at = begin;
    if (mprotect(at, size, PROT_READ | PROT_WRITE)) return nullptr;
    u64 rest = room - size - PAGE;
    d->unused.erase(begin);
    if (rest) d->unused[at + size + PAGE] = rest;
    d->left -= size;
    u8* p = at + size - bytes;
    d->blocks[p] = bytes;
    memset(p, 0xFF, bytes);
    set_live(*d, p, bytes, bytes);
    return p;
  }
  return nullptr;
}

extern "C" u64 cuemu_left(const Device* d) { return d->left; }

extern "C" void cuemu_release(Device* d, u8* p) {
  u64 bytes = d->blocks[p], size = pages(bytes);
  d->blocks.erase(p);
  set_live(*d, p, bytes, 0);
  u8* at = p + bytes - size;
  madvise(at, size, MADV_DONTNEED);
  mprotect(at, size, PROT_NONE);
  d->left += size;
  auto here = d->unused.emplace(at, size + PAGE).first;
  auto after = std::next(here);
  if (after != d->unused.end() && here->first + here->second == after->first) {
    here->second += after->second;
    d->unused.erase(after);
  }
  if (here != d->unused.begin()) {
    auto before = std::prev(here);
    if (before->first + before->second == here->first) {
      before->second += here->second;
      d->unused.erase(here);
    }
  }
}

// From now on the first `bytes` bytes of the block may be used; they are NaN.
extern "C" void cuemu_block_taken(Device* d, u8* p, u64 bytes) {
  set_live(*d, p, d->blocks[p], bytes);
  memset(p, 0xFF, bytes);
}
extern "C" void cuemu_block_dropped(Device* d, u8* p) { set_live(*d, p, d->blocks[p], 0); }

// Whether every byte of the range is of a live block.
extern "C" int cuemu_is_live(const Device* d, const u8* p, u64 bytes) {
  u64 offset = p - d->memory.begin;
  if (offset >= d->memory.bytes || bytes > d->memory.bytes - offset) return 0;
  for (u64 end = offset + bytes; offset < end; offset = (offset / UNIT + 1) * UNIT)
    if (std::min(end - offset / UNIT * UNIT, UNIT) > live_at(*d, offset)) return 0;
  return 1;
}
