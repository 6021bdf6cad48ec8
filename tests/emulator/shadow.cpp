// Every access of a kernel to device memory comes through here: alignment, bounds, and races between blocks.
//
// Beside each aligned group of 4 bytes of device memory lie two marks, of who wrote it and who read it last. A mark is
// twice the number of an access (a line of the kernel, run by one block; see `Access`). Numbers grow from launch to
// launch, so what an earlier launch left is simply too small and nothing is cleared. The read mark keeps the first
// reader; its lowest bit says that other blocks have read the group too. A group that is accessed in parts is split for
// the rest of the launch: its marks are the launch's first number, and each of its bytes has two marks elsewhere.
//
// Two blocks race on a byte if one writes it, the other reads or writes it, not both by atomics, and neither happened
// before the other (order.hpp).
#include <algorithm>
#include <cstdio>
#include <sys/mman.h>

#include "memory.hpp"

namespace cuemu {
namespace {
constexpr Mark SHARED_READ = 1;
enum What { READS, WRITES, CHANGES };
const char* const VERB[] = {"reads", "writes", "changes"};

struct Position {
  char text[40];
};
Position position(u32 index) {
  Dim g = machine->block.grid;
  Position p;
  snprintf(p.text, sizeof p.text, "%u,%u,%u", index % g.x, index / g.x % g.y, index / g.x / g.y);
  return p;
}

// ---- bounds

[[gnu::noinline]] void refuse(const void* p, u32 bytes, const char* what, Site site) {
  const Range& memory = machine->device().memory;
  if ((uintptr_t)p % bytes) fail(site, "misaligned %s of %u bytes at %p", what, bytes, p);
  if ((u64)((const u8*)p - memory.begin) >= memory.bytes) fail(site, "%s at %p, which is no device memory", what, p);
  fail(site, "%s of %u bytes at %p, outside every live block", what, bytes, p);
}

// The offset in device memory of an access that is allowed. An aligned one stays within its unit.
template <u32 BYTES>
inline u64 checked(Device& d, const void* p, const char* what, Site site) {
  u64 offset = (const u8*)p - d.memory.begin;
  bool inside = offset < d.memory.bytes && offset % UNIT + BYTES <= live_at(d, offset);
  if ((uintptr_t)p % BYTES || !inside) refuse(p, BYTES, what, site);
  return offset;
}

// A thread that reads one word so often with nothing between waits for another block, which on a GPU may not even have
// started.
inline void check_spinning(const void* p, Site site) {
  constexpr u32 SPIN = 1 << 20;
  Fiber& f = me();
  f.polls = f.polled == p ? f.polls + 1 : 0;
  f.polled = p;
  if (f.polls > SPIN) fail(site, "the thread reads the word at %p for ever: blocks cannot wait for each other", p);
}

// ---- races

// The mark of this line in this block. A line has two places; the one used last is in the first.
constexpr u32 LINES = sizeof(Machine::lines) / sizeof(KnownLine);
inline bool is(const Machine& m, const KnownLine& known, Site site, bool atomic) {
  return known.mark >= m.first_valid && known.site.line == site.line && known.site.file == site.file &&
         known.atomic == atomic;
}
[[gnu::noinline]] Mark find_mark(Machine& m, u32 place, Site site, bool atomic) {
  KnownLine &first = m.lines[place], &second = m.lines[(place + LINES / 2 + 1) % LINES];
  std::swap(first, second);
  if (!is(m, first, site, atomic)) {
    Access access{site, atomic, m.block_index, m.clock};
    first = {site, atomic, m.device().shadow.number(m, access)};
  }
  return first.mark;
}
inline Mark mark_of(Machine& m, Site site, bool atomic) {
  u32 place = (((uintptr_t)site.file >> 4) + (u32)site.line * 2 + atomic) % LINES;
  KnownLine& known = m.lines[place];
  return is(m, known, site, atomic) ? known.mark : find_mark(m, place, site, atomic);
}

const std::unordered_map<u32, u32>& seen(Machine& m) {
  if (!m.seen_known) m.seen = m.launch->order.seen_by(m.block_index);
  m.seen_known = true;
  return m.seen;
}
// Whether the other block's access happened before what this block does now.
bool ordered(Machine& m, const Access& other) {
  if (other.block == m.block_index) return true;
  auto clock = seen(m).find(other.block);
  return clock != m.seen.end() && clock->second >= other.clock;
}
bool all_ordered(Machine& m) { return seen(m).size() + 1 >= m.launch->blocks; }

void report_race(const Access& other, const u8* p, What what, const char* did, const char* who, Site site) {
  fail(site, "race between blocks: %s the byte at %p that block %s%s %s (%s:%d), and nothing orders the two",
       VERB[what], p, position(other.block).text, who, did, base_name(other.site.file), other.site.line);
}

void check_writer(Machine& m, Mark mark, const u8* p, What what, Site site) {
  const Access& other = m.device().shadow.access(mark);
  if ((what == CHANGES && other.atomic) || ordered(m, other)) return;
  report_race(other, p, what, other.atomic ? "changed" : "wrote", "", site);
}

// Of many readers one is known: they are in order if every other block of the launch is.
void check_reader(Machine& m, Mark mark, const u8* p, What what, Site site) {
  const Access& other = m.device().shadow.access(mark);
  bool many = mark & SHARED_READ;
  if (ordered(m, other) && (!many || all_ordered(m))) return;
  report_race(other, p, what, "read", many ? " and others" : "", site);
}

// What a mark says to this block. Marks stay below 2^31, so vector units without unsigned comparison can compare them.
struct Window {
  Mark first;     // of the launch; also the mark of a split group
  Mark from, to;  // of this block, except for its numbers in earlier chunks
  bool stale(Mark mark) const { return mark < first; }
  bool mine(Mark mark) const { return (mark >= from) & (mark < to); }
  void add_reader(Cell& cell, Mark mark) const {
    cell.read = stale(cell.read) ? mark : cell.read | !mine(cell.read);
  }
};
inline Window window(const Machine& m) { return {m.launch->first_mark, m.first_mine, m.next_mark}; }

// Reads or writes one cell: a group or a byte of a split one.
void access_cell(Machine& m, Cell& cell, Mark mark, const u8* p, What what, Site site) {
  const Window w = window(m);
  if (!w.stale(cell.written) && !w.mine(cell.written)) check_writer(m, cell.written, p, what, site);
  if (what == READS) {
    w.add_reader(cell, mark);
  } else {
    bool others = !w.mine(cell.read) || cell.read & SHARED_READ;
    if (!w.stale(cell.read) && others) check_reader(m, cell.read, p, what, site);
    cell.written = mark;
  }
}

// Several host threads may look at one group at once, and one of them may split it meanwhile.
class GroupLock {
 public:
  GroupLock(Machine& m, u64 group) : m(m) {
    if (!m.launch->parallel) return;
    static std::atomic_flag locks[1024];
    std::atomic_flag& lock = locks[group % 1024];
    while (lock.test_and_set(std::memory_order_acquire)) {
    }
    m.held = &lock;
  }
  ~GroupLock() {
    if (m.held) std::exchange(m.held, nullptr)->clear(std::memory_order_release);
  }

 private:
  Machine& m;
};

// Bytes of one group, which is split if it was not and they are not all of it.
[[gnu::noinline]] void access_group(Machine& m, u64 offset, u32 bytes, Mark mark, const u8* p, What what, Site site) {
  GroupLock lock(m, offset / 4);
  Shadow& shadow = m.device().shadow;
  Cell& group = shadow.groups()[offset / 4];
  Cell* parts = shadow.bytes() + offset / 4 * 4;
  Mark split = m.launch->first_mark;
  if (bytes == 4 && group.written != split) return access_cell(m, group, mark, p, what, site);
  if (group.written != split) {
    for (u32 i = 0; i < 4; i++) parts[i] = group;
    group = {split, split};
  }
  for (u32 i = 0; i < bytes; i++) access_cell(m, parts[offset % 4 + i], mark, p + i, what, site);
}

template <u32 BYTES>
inline void access(Machine& m, const void* p, What what, Site site) {
  u64 offset = checked<BYTES>(m.device(), p, what == READS ? "load" : what == WRITES ? "store" : "atomic", site);
  Mark mark = mark_of(m, site, what == CHANGES);
  if constexpr (BYTES < 4) return access_group(m, offset, BYTES, mark, (const u8*)p, what, site);
  Cell* cells = m.device().shadow.groups() + offset / 4;
  const Window w = window(m);
  // Most accesses find nothing of other blocks: all cells at once, without branches.
  i32 others = 0, unread = 0;
  for (u32 i = 0; i < BYTES / 4; i++) {
    others |= !w.stale(cells[i].written) & !w.mine(cells[i].written);
    if (what == READS) unread |= w.stale(cells[i].read) | (!w.mine(cells[i].read) & !(cells[i].read & SHARED_READ));
    else others |= !w.stale(cells[i].read) & (!w.mine(cells[i].read) | (cells[i].read & SHARED_READ));
  }
  if (others) {
    for (u32 i = 0; i < BYTES; i += 4) access_group(m, offset + i, 4, mark, (const u8*)p + i, what, site);
  } else if (what != READS) {
    for (u32 i = 0; i < BYTES / 4; i++) cells[i].written = mark;
  } else if (unread) {
    for (u32 i = 0; i < BYTES / 4; i++) w.add_reader(cells[i], mark);
  }
}
}  // namespace

template <unsigned BYTES>
void on_load(const void* p, Site site) {
  check_spinning(p, site);
  access<BYTES>(*machine, p, READS, site);
}
template <unsigned BYTES>
void on_store(const void* p, Site site) {
  Machine& m = *machine;
  Fiber& f = me();
  f.polled = nullptr;
  f.wrote = m.phase + 1;
  f.fenced_all = false;
  access<BYTES>(m, p, WRITES, site);
}
#define SIZE(bytes)                                \
  template void on_load<bytes>(const void*, Site); \
  template void on_store<bytes>(const void*, Site);
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)
#undef SIZE

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
  check_spinning(p, site);
  access<4>(m, p, CHANGES, site);
  Order& order = m.launch->order;
  std::lock_guard<std::mutex> guard(order.lock);
  bool releases = m.any_fence && fenced(m, f);
  f.saw = order.enter(p, releases, m.block_index, m.clock);
  if (releases) {
    m.clock++;
    m.first_valid = m.next_mark;
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
  if (!cells.reserve((memory / 4 + memory) * sizeof(Cell), true) || !segments.reserve(SEGMENTS * sizeof(Access*), true))
    return false;
  split = memory / 4;
  madvise(cells.begin, cells.bytes, MADV_HUGEPAGE);
  return true;
}
Shadow::~Shadow() {
  if (!segments.begin) return;
  for (u64 i = 0; i < SEGMENTS && table()[i]; i++) delete[] table()[i];
}

Mark Shadow::begin_launch() {
  if (next > LAST - (1u << 28)) {
    madvise(cells.begin, cells.bytes, MADV_DONTNEED);
    next = CHUNK;
  }
  first = next.fetch_add(CHUNK);
  return first * 2;
}

Mark Shadow::number(Machine& m, const Access& access) {
  if (m.next_mark == m.end_mark) {
    u32 chunk = next.fetch_add(CHUNK);
    if (chunk > LAST) fail(NOWHERE, "the launch has more accesses than the emulator can number");
    m.first_mine = m.next_mark = chunk * 2;
    m.end_mark = (chunk + CHUNK) * 2;
    std::lock_guard<std::mutex> guard(lock);
    Access*& segment = table()[(chunk - first) / SEGMENT];
    if (!segment) segment = new Access[SEGMENT];
  }
  Mark mark = m.next_mark;
  m.next_mark += 2;
  this->access(mark) = access;
  return mark;
}

void Machine::begin_launch(Mark first_mark) {
  if (first_mark < next_mark)
    for (KnownLine& line : lines) line.mark = 0;
  next_mark = end_mark = first_mark;
}

void begin_block(Machine& m) {
  m.first_mine = m.first_valid = m.next_mark;
  m.clock = 1;
  m.phase = 0;
  m.any_fence = false;
  m.seen.clear();
  m.seen_known = false;
}
}  // namespace cuemu
