// Every access of a kernel to device memory comes through here: alignment, bounds, and races between blocks.
//
// Beside each byte of device memory lie two words, of who wrote it and who read it last. A word is the number of an
// access (a line of the kernel, run by one block; see `Access`), times two. Numbers grow from launch to launch, so what
// an earlier launch left is simply too small and nothing is cleared. The read word keeps the first reader; its lowest
// bit says that other blocks have read the byte too.
//
// Two blocks race on a byte if one writes it, the other reads or writes it, not both by atomics, and neither happened
// before the other (order.hpp).
#include <algorithm>
#include <cstdio>
#include <sys/mman.h>

#include "memory.hpp"

namespace cuemu {
namespace {
constexpr i32 SHARED_READ = 1;

struct Position {
  char text[40];
};
Position position(u32 index) {
  Dim g = machine->block.grid;
  Position p;
  snprintf(p.text, sizeof p.text, "%u,%u,%u", index % g.x, index / g.x % g.y, index / g.x / g.y);
  return p;
}

// The number of this line in this block, times two.
u32 number_of(Machine& m, Site site, bool atomic) {
  u32 at = ((uintptr_t)site.file >> 4) + (u32)site.line * 2 + atomic;
  for (u32 i = 0; i < 4; i++) {
    KnownLine& known = m.lines[(at + i) % std::size(m.lines)];
    if (known.number < m.first_valid) {
      known = {site, atomic, m.device().shadow.number(m, {site, atomic, m.block_index, m.clock})};
      return known.number;
    }
    if (known.site.line == site.line && known.site.file == site.file && known.atomic == atomic) return known.number;
  }
  KnownLine& known = m.lines[at % std::size(m.lines)];
  known = {site, atomic, m.device().shadow.number(m, {site, atomic, m.block_index, m.clock})};
  return known.number;
}

bool mine(const Machine& m, u32 word) { return word - m.first_mine < m.next_number - m.first_mine; }

// Whether the other block's access happened before what this block does now.
bool ordered(Machine& m, const Access& other) {
  if (other.block == m.block_index) return true;
  if (!m.seen_known) {
    m.seen = m.launch->order.seen_by(m.block_index);
    m.seen_known = true;
  }
  auto clock = m.seen.find(other.block);
  return clock != m.seen.end() && clock->second >= other.clock;
}

enum What { READS, WRITES, ADDS };
const char* const VERB[] = {"reads", "writes", "changes"};

[[gnu::noinline]] void check_writer(Machine& m, u32 word, const u8* p, What what, Site site) {
  const Access& other = m.device().shadow.access(word);
  if ((what == ADDS && other.atomic) || ordered(m, other)) return;
  fail("race between blocks: block %s %s the byte at %p (%s:%d) that block %s %s (%s:%d), and nothing orders them",
       position(m.block_index).text, VERB[what], p, base_name(site.file), site.line, position(other.block).text,
       other.atomic ? "changed" : "wrote", base_name(other.site.file), other.site.line);
}

[[gnu::noinline]] void check_reader(Machine& m, u32 word, const u8* p, What what, Site site) {
  const Access& other = m.device().shadow.access(word);
  bool all = !(word & SHARED_READ) || (ordered(m, other) && m.seen.size() + 1 >= m.launch->blocks);
  if (ordered(m, other) && all) return;
  fail("race between blocks: block %s %s the byte at %p (%s:%d) that block %s%s read (%s:%d), and nothing orders them",
       position(m.block_index).text, VERB[what], p, base_name(site.file), site.line, position(other.block).text,
       other.block == m.block_index ? " and others" : "", base_name(other.site.file), other.site.line);
}

// Looks at the bytes one by one: `suspicious` words were found among them.
template <bool WRITE>
[[gnu::noinline]] void look_closely(Machine& m, const u32* written, const u32* read, const u8* p, u32 bytes, What what, Site site) {
  u32 writer = 0, reader = 0;  // the last ones that were found to be in order
  for (u32 i = 0; i < bytes; i++) {
    u32 w = written[i], r = read[i];
    if (w >= m.launch->first_number && !mine(m, w) && w != writer) check_writer(m, writer = w, p + i, what, site);
    if (WRITE && r >= m.launch->first_number && (!mine(m, r) || r & SHARED_READ) && r != reader)
      check_reader(m, reader = r, p + i, what, site);
  }
}

// Words stay below 2^31, so that vector units without unsigned comparison can compare them; the loops below have no
// branches and become a few vector instructions.
struct Window {
  i32 first;     // of the launch
  i32 from, to;  // of this block
  bool stale(i32 word) const { return word < first; }
  bool mine(i32 word) const { return (word >= from) & (word < to); }
};

template <u32 BYTES>
void mark_load(Machine& m, u64 offset, const u8* p, Site site) {
  const i32* written = (const i32*)m.device().shadow.written() + offset;
  i32* read = (i32*)m.device().shadow.read() + offset;
  i32 number = number_of(m, site, false);
  const Window w{(i32)m.launch->first_number, (i32)m.first_mine, (i32)m.next_number};
  i32 suspicious = 0, unknown = 0;
  for (u32 i = 0; i < BYTES; i++) {
    suspicious |= !w.stale(written[i]) & !w.mine(written[i]);
    unknown |= w.stale(read[i]) | (!w.mine(read[i]) & !(read[i] & SHARED_READ));
  }
  if (suspicious) look_closely<false>(m, (const u32*)written, (const u32*)read, p, BYTES, READS, site);
  if (!unknown) return;
  for (u32 i = 0; i < BYTES; i++) read[i] = w.stale(read[i]) ? number : read[i] | !w.mine(read[i]);
}

template <u32 BYTES>
void mark_store(Machine& m, u64 offset, const u8* p, What what, Site site) {
  i32* written = (i32*)m.device().shadow.written() + offset;
  const i32* read = (const i32*)m.device().shadow.read() + offset;
  i32 number = number_of(m, site, what == ADDS);
  const Window w{(i32)m.launch->first_number, (i32)m.first_mine, (i32)m.next_number};
  i32 suspicious = 0;
  for (u32 i = 0; i < BYTES; i++) {
    suspicious |= !w.stale(written[i]) & !w.mine(written[i]);
    suspicious |= !w.stale(read[i]) & (!w.mine(read[i]) | (read[i] & SHARED_READ));
  }
  if (suspicious) look_closely<true>(m, (const u32*)written, (const u32*)read, p, BYTES, what, site);
  for (u32 i = 0; i < BYTES; i++) written[i] = number;
}

// The offset in device memory of an access that is allowed.
u64 checked(Machine& m, const void* p, u32 bytes, const char* what, Site site) {
  Device& d = m.device();
  u64 offset = (const u8*)p - d.memory.begin;
  if ((uintptr_t)p % std::min(bytes & -bytes, 16u))
    fail("misaligned %s of %u bytes at %p (%s:%d)", what, bytes, p, base_name(site.file), site.line);
  if (offset >= d.memory.bytes) fail("%s at %p, which is no device memory (%s:%d)", what, p, base_name(site.file), site.line);
  if (offset % UNIT + bytes > live_at(d, offset))
    fail("%s of %u bytes at %p, outside every live block (%s:%d)", what, bytes, p, base_name(site.file), site.line);
  return offset;
}

// A thread that reads one word so often with nothing between waits for another block, which on a GPU may not even have
// started.
void check_spinning(const void* p, Site site) {
  constexpr u32 SPIN = 1 << 20;
  Fiber& f = me();
  f.polls = f.polled == p ? f.polls + 1 : 0;
  f.polled = p;
  if (f.polls > SPIN) fail("the thread reads the word at %p for ever: blocks cannot wait for each other (%s:%d)", p,
                           base_name(site.file), site.line);
}
}  // namespace

void on_load(const void* p, u32 bytes, Site site) {
  Machine& m = *machine;
  u64 offset = checked(m, p, bytes, "load", site);
  check_spinning(p, site);
  switch (bytes) {
    case 1: return mark_load<1>(m, offset, (const u8*)p, site);
    case 2: return mark_load<2>(m, offset, (const u8*)p, site);
    case 4: return mark_load<4>(m, offset, (const u8*)p, site);
    case 8: return mark_load<8>(m, offset, (const u8*)p, site);
    default: return mark_load<16>(m, offset, (const u8*)p, site);
  }
}

void on_store(const void* p, u32 bytes, Site site) {
  Machine& m = *machine;
  u64 offset = checked(m, p, bytes, "store", site);
  Fiber& f = me();
  f.polled = nullptr;
  f.wrote = m.phase + 1;
  f.fenced_all = false;
  switch (bytes) {
    case 1: return mark_store<1>(m, offset, (const u8*)p, WRITES, site);
    case 2: return mark_store<2>(m, offset, (const u8*)p, WRITES, site);
    case 4: return mark_store<4>(m, offset, (const u8*)p, WRITES, site);
    case 8: return mark_store<8>(m, offset, (const u8*)p, WRITES, site);
    default: return mark_store<16>(m, offset, (const u8*)p, WRITES, site);
  }
}

namespace {
// Whether a fence stands between everything that the block wrote and what thread `t` does now: the writer's own, with a
// barrier after it, or t's, with a barrier before it. Lanes of one warp need no barrier (a __syncwarp is not seen).
bool fenced(const Machine& m, const Fiber& t) {
  for (const Fiber& f : m.fibers) {
    if (&f - m.fibers.data() >= m.threads) break;
    if (!f.wrote || &f == &t ? f.fenced_all || !f.wrote : false) continue;
    bool same_warp = f.thread.warp == t.thread.warp && &f != &t;
    bool by_itself = f.fenced_all && (same_warp || f.fenced < m.phase + 1);
    bool by_t = &f != &t && (t.fenced > f.wrote || (same_warp && t.fenced == f.wrote));
    if (!by_itself && !by_t) return false;
  }
  return true;
}

// Runs an atomic; it releases and acquires as order.hpp says.
template <class Change>
u32 atomic(u32* p, Site site, Change change) {
  Machine& m = *machine;
  Fiber& f = me();
  u64 offset = checked(m, p, 4, "atomic", site);
  check_spinning(p, site);
  mark_store<4>(m, offset, (const u8*)p, ADDS, site);
  Order& order = m.launch->order;
  std::lock_guard<std::mutex> guard(order.lock);
  bool releases = m.any_fence && fenced(m, f);
  f.saw = order.enter(p, releases, m.block_index, m.clock);
  if (releases) {
    m.clock++;
    m.first_valid = m.next_number;
  }
  u32 old = *p;
  *p = change(old);
  return old;
}
}  // namespace

u32 fetch_add(u32* p, u32 v, Site site) {
  return atomic(p, site, [v](u32 old) { return old + v; });
}
u32 fetch_or(u32* p, u32 v, Site site) {
  return atomic(p, site, [v](u32 old) { return old | v; });
}
u32 fetch_inc(u32* p, u32 limit, Site site) {
  return atomic(p, site, [limit](u32 old) { return old >= limit ? 0 : old + 1; });
}

void fence() {
  Machine& m = *machine;
  Fiber& f = me();
  m.any_fence = true;
  f.fenced = m.phase + 1;
  f.fenced_all = true;
  if (f.saw.counter == Order::NONE) return;
  m.launch->order.acquire(m.block_index, f.saw);
  f.saw = {};
  m.seen_known = false;
}

// ---- numbers of accesses

bool Shadow::reserve(u64 memory) {
  if (!words.reserve(memory * 8, true) || !segments.reserve(SEGMENTS * sizeof(Access*), true)) return false;
  madvise(words.begin, words.bytes, MADV_HUGEPAGE);
  return true;
}
Shadow::~Shadow() {
  if (!segments.begin) return;
  for (u64 i = 0; i < SEGMENTS && table()[i]; i++) delete[] table()[i];
}

u32 Shadow::begin_launch() {
  if (next > LAST - (1u << 28)) {
    madvise(words.begin, words.bytes, MADV_DONTNEED);
    next = CHUNK;
  }
  first = next;
  return first * 2;
}

u32 Shadow::number(Machine& m, const Access& access) {
  if (m.next_number == m.end_number) {
    u32 chunk = next.fetch_add(CHUNK);
    if (chunk > LAST) fail("the launch has more accesses than the emulator can number");
    m.first_mine = m.next_number = chunk * 2;
    m.end_number = (chunk + CHUNK) * 2;
    std::lock_guard<std::mutex> guard(lock);
    Access*& segment = table()[(chunk - first) / SEGMENT];
    if (!segment) segment = new Access[SEGMENT];
  }
  u32 word = m.next_number;
  m.next_number += 2;
  this->access(word) = access;
  return word;
}

void Machine::begin_launch(u32 first_number) {
  if (first_number < next_number)
    for (KnownLine& line : lines) line.number = 0;
  next_number = end_number = first_number;
}

void begin_block(Machine& m) {
  m.first_mine = m.first_valid = m.next_number;
  m.clock = 1;
  m.phase = 0;
  m.any_fence = false;
  m.seen.clear();
  m.seen_known = false;
}
}  // namespace cuemu
