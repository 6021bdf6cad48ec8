// Device memory, and the checks of every access a kernel makes to it.
#include "memory.hpp"

#include <algorithm>
#include <cstdio>
#include <sys/mman.h>

namespace cuemu {
namespace {
constexpr u64 PAGE = 4096, UNIT = 256;

u64 pages(u64 bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// Says which bytes of [p, p + bytes) may be used: the first `usable`.
void set_live(Device& d, const u8* p, u64 bytes, u64 usable) {
  u16* live = (u16*)d.live.begin + (p - d.memory.begin) / UNIT;
  for (u64 at = 0; at < bytes; at += UNIT) *live++ = at < usable ? std::min(UNIT, usable - at) : 0;
}
u32 live_at(const Device& d, u64 offset) { return ((const u16*)d.live.begin)[offset / UNIT]; }

void check(const void* p, u32 bytes, const char* what, Site site) {
  Device& d = *machine->launch->device;
  u64 offset = (const u8*)p - d.memory.begin;
  if ((uintptr_t)p % std::min(bytes & -bytes, 16u))
    fail("misaligned %s of %u bytes at %p (%s:%d)", what, bytes, p, base_name(site.file), site.line);
  if (offset >= d.memory.bytes) fail("%s at %p, which is no device memory (%s:%d)", what, p, base_name(site.file), site.line);
  if (offset % UNIT + bytes > live_at(d, offset))
    fail("%s of %u bytes at %p, outside every live block (%s:%d)", what, bytes, p, base_name(site.file), site.line);
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

void begin_block(Machine&) {}

void on_load(const void* p, u32 bytes, Site site) {
  check(p, bytes, "load", site);
  Fiber& f = me();
  f.polls = f.polled == p ? f.polls + 1 : 0;
  f.polled = p;
  if (f.polls > SPIN) fail("the thread reads one word for ever: no block may wait for another (%s:%d)", base_name(site.file), site.line);
}
void on_store(const void* p, u32 bytes, Site site) {
  check(p, bytes, "store", site);
  me().polls = 0;
}

namespace {
void on_atomic(const void* p, Site site) {
  check(p, 4, "atomic", site);
  Fiber& f = me();
  f.polls = f.polled == p ? f.polls + 1 : 0;
  f.polled = p;
  if (f.polls > SPIN) fail("the thread tries one word for ever: no block may wait for another (%s:%d)", base_name(site.file), site.line);
}
}  // namespace

u32 fetch_add(u32* p, u32 v, Site site) {
  on_atomic(p, site);
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
u32 fetch_or(u32* p, u32 v, Site site) {
  on_atomic(p, site);
  return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);
}
u32 fetch_inc(u32* p, u32 limit, Site site) {
  on_atomic(p, site);
  u32 old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}
void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

}  // namespace cuemu

using namespace cuemu;

// A device with this much memory, or null when the system has no address space for it.
extern "C" Device* cuemu_device(u64 memory) {
  Device* d = new Device;
  u64 space = pages(memory) * 2;
  if (!d->memory.reserve(space, false) || !d->live.reserve(space / UNIT * 2, true)) {
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
