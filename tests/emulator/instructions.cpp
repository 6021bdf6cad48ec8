// The instructions of a warp, and cp.async. Lanes hand over where their operands are; the last one acts for all.
#include <algorithm>

#include "memory.hpp"
#include "sanitizer.hpp"

namespace cuemu {

// ---- shuffles

namespace {
// Not memcpy, which the thread sanitizer would take for an access of the lane that acts for all.
void give(const Slot& to, const Slot& from, u32 bytes) {
  for (u32 i = 0; i < bytes; i++) ((volatile u8*)to.out)[i] = ((const volatile u8*)from.in)[i];
}
void give4(const Slot& to, const Slot& from) { *(u32*)to.out = *(const u32*)from.in; }
}  // namespace

void shuffle(u32 mask, const void* value, u32 bytes, u32 source, void* result, Site site) {
  Warp& w = machine->warps[self->warp];
  w.slot[self->lane] = {value, nullptr, result, source};
  if (!arrive(w, mask, 2, site)) return park();
  for (u32 rest = w.mask; rest; rest &= rest - 1) {
    Slot& slot = w.slot[__builtin_ctz(rest)];
    if (!(w.mask >> slot.value & 1))
      fail(site, "shuffle from lane %u, which takes no part", slot.value);
    if (bytes == 4) give4(slot, w.slot[slot.value]);
    else give(slot, w.slot[slot.value], bytes);
  }
  dismiss(w);
}

// ---- ldmatrix

namespace {
// The eight rows of a matrix are read in one go if they lie in eight different groups of four banks.
void count_wavefronts(const Slot* rows, int matrices) {
  for (int m = 0; m < matrices; m++) {
    u32 in_group[8] = {}, most = 0;
    for (int i = 0; i < 8; i++) {
      bool again = false;
      for (int j = 0; j < i; j++) again |= rows[8 * m + j].in == rows[8 * m + i].in;
      if (!again) most = std::max(most, ++in_group[(uintptr_t)rows[8 * m + i].in >> 4 & 7]);
    }
    machine->ldmatrix_phases++;
    machine->ldmatrix_wavefronts += most;
  }
}

// Lane l gets of matrix m the elements (l / 4, l % 4 * 2) and (l / 4, l % 4 * 2 + 1), or transposed (j, i) for (i, j).
template <bool TRANS>
void distribute(const Slot* slots, int matrices) {
  for (u32 lane = 0; lane < 32; lane++) {
    u32 i = lane / 4, j = lane % 4 * 2;
    u32* r = (u32*)slots[lane].out;
    for (int m = 0; m < matrices; m++) {
      const Slot* row = slots + 8 * m;
      if (TRANS) {
        u16 pair[2] = {((const u16*)row[j].in)[i], ((const u16*)row[j + 1].in)[i]};
        memcpy(&r[m], pair, 4);
      } else {
        memcpy(&r[m], (const u16*)row[i].in + j, 4);
      }
    }
  }
}
}  // namespace

void ldmatrix(u32* r, int matrices, bool trans, const void* row, Site site) {
  Machine& m = *machine;
  u32 lane = self->lane;
  if ((int)lane < 8 * matrices) {
    if ((uintptr_t)row % 16) fail(site, "ldmatrix row at %p is not a multiple of 16", row);
    if ((const u8*)row < m.shared || (const u8*)row + 16 > m.shared + m.shared_bytes)
      fail(site, "ldmatrix row at byte %td of %u bytes of shared memory", (const u8*)row - m.shared, m.shared_bytes);
    sanitizer::reads(row, 16);
  }
  Warp& w = m.warps[self->warp];
  w.slot[lane] = {row, nullptr, r, 0};
  if (!arrive(w, ~0u, 3, site)) return park();
  if (w.present != ~0u) fail(site, "ldmatrix in a warp of fewer than 32 lanes");
  count_wavefronts(w.slot, matrices);
  if (trans) distribute<true>(w.slot, matrices);
  else distribute<false>(w.slot, matrices);
  dismiss(w);
}

// ---- mma.m16n8k16
//
// The product is computed for 16 rows at a time in one vector, k by k: a product of two fp16 is exact in f32, so a
// fused multiply-add and a multiplication with an addition round alike, and every CPU gives the same bits. A tensor
// core adds in another order and rounds otherwise; tests allow for it.

namespace {
typedef float Floats __attribute__((vector_size(64)));
typedef u32 Words __attribute__((vector_size(64)));

// fp16 in the low halves of the words. Scaling by 2^112 moves the exponent and makes subnormals normal.
[[gnu::always_inline]] inline Floats widen(Words h) {
  Words magnitude = (h & 0x7FFF) << 13, sign = (h & 0x8000) << 16;
  Words special = (Words)((h & 0x7C00) == 0x7C00) & 0x7F800000;
  Floats scaled = (Floats)magnitude * 0x1p112f;
  return (Floats)((Words)scaled | special | sign);
}

// Lane 4 g + t holds a: rows g and g + 8, columns 2 t, 2 t + 1, and the same 8 columns on; b: rows 2 t, 2 t + 1 and 8
// rows on, column g; d: rows g and g + 8, columns 2 t, 2 t + 1.
[[gnu::always_inline]] inline void multiply(const Slot* slots) {
  alignas(64) u32 a[8][16], b[8][8];  // pairs of k; rows of a, columns of b
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, t = lane % 4;
    const u32 *from_a = (const u32*)slots[lane].in, *from_b = (const u32*)slots[lane].in2;
    a[t][g] = from_a[0];
    a[t][g + 8] = from_a[1];
    a[t + 4][g] = from_a[2];
    a[t + 4][g + 8] = from_a[3];
    b[t][g] = from_b[0];
    b[t + 4][g] = from_b[1];
  }
  alignas(64) float even[64], odd[64];  // b at 2 k and 2 k + 1
  for (int i = 0; i < 4; i++) {
    Words pairs = ((const Words*)b)[i];
    ((Floats*)even)[i] = widen(pairs & 0xFFFF);
    ((Floats*)odd)[i] = widen(pairs >> 16);
  }
  Floats sum[8] = {};
  for (int pair = 0; pair < 8; pair++) {
    Words both = *(const Words*)a[pair];
    Floats first = widen(both & 0xFFFF), second = widen(both >> 16);
    for (int n = 0; n < 8; n++) sum[n] += first * even[8 * pair + n];
    for (int n = 0; n < 8; n++) sum[n] += second * odd[8 * pair + n];
  }
  for (int lane = 0; lane < 32; lane++) {
    int g = lane / 4, t = lane % 4;
    float* d = (float*)slots[lane].out;
    d[0] += sum[2 * t][g];
    d[1] += sum[2 * t + 1][g];
    d[2] += sum[2 * t][g + 8];
    d[3] += sum[2 * t + 1][g + 8];
  }
}

#define FUSED optimize("fp-contract=fast")
__attribute__((target("avx512f,avx512bw,avx512vl,fma"), FUSED)) void multiply_avx512(const Slot* s) { multiply(s); }
__attribute__((target("avx2,fma"), FUSED)) void multiply_avx2(const Slot* s) { multiply(s); }
void multiply_plain(const Slot* s) { multiply(s); }
#undef FUSED

bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
void (*const multiply_here)(const Slot*) = has_avx512() ? multiply_avx512 : has_avx2() ? multiply_avx2 : multiply_plain;
}  // namespace

void mma_m16n8k16(float* d, const u32* a, const u32* b, Site site) {
  Warp& w = machine->warps[self->warp];
  w.slot[self->lane] = {a, b, d, 0};
  if (!arrive(w, ~0u, 4, site)) return park();
  if (w.present != ~0u) fail(site, "mma in a warp of fewer than 32 lanes");
  multiply_here(w.slot);
  dismiss(w);
}

// ---- cp.async
//
// A copy happens at once, or as late as the wait allows, or anywhere between: all are legal, and a kernel must not
// notice.

void perform(const Copy& copy) {
  if (copy.from) memcpy(copy.to, copy.from, 16);
  else memset(copy.to, 0, 16);
  sanitizer::writes(copy.to, 16);
}

void perform_some_copies(Fiber& f) {
  for (u32 i = f.waited_copies; i < f.copies.size(); i++) {
    Copy& copy = f.copies[i];
    if (copy.done || machine->next() & 1) continue;
    perform(copy);
    copy.done = true;
  }
}

void copy_async(void* to, const void* from, bool valid, Site site) {
  Machine& m = *machine;
  Fiber& f = me();
  if ((uintptr_t)to % 16 || (valid && (uintptr_t)from % 16))
    fail(site, "misaligned cp.async from %p to %p", from, to);
  if ((u8*)to < m.shared || (u8*)to + 16 > m.shared + m.shared_bytes)
    fail(site, "cp.async to byte %td of %u bytes of shared memory", (u8*)to - m.shared, m.shared_bytes);
  if (valid) on_load<16>(from, site);
  Copy copy{(u8*)to, valid ? (const u8*)from : nullptr, m.shuffle && m.next() & 1};
  if (copy.done) perform(copy);
  f.copies.push_back(copy);
}

void copy_commit() { me().groups.push_back(me().copies.size()); }

void copy_wait(u32 groups) {
  Fiber& f = me();
  while (f.groups.size() - f.waited_groups > groups) {
    u32 end = f.groups[f.waited_groups++];
    for (; f.waited_copies < end; f.waited_copies++)
      if (!f.copies[f.waited_copies].done) perform(f.copies[f.waited_copies]);
  }
  if (f.waited_groups == f.groups.size() && f.waited_copies == f.copies.size()) forget_copies(f);
}

void end_copies(Fiber& f) {
  if (size_t left = f.copies.size() - f.waited_copies)
    fail(NOWHERE, "the thread ends with %zu copies (cp.async) it has not waited for", left);
  if (!f.groups.empty()) forget_copies(f);
}

void forget_copies(Fiber& f) {
  f.copies.clear();
  f.groups.clear();
  f.waited_copies = f.waited_groups = 0;
}
}  // namespace cuemu

using namespace cuemu;

// Whether all ways of this CPU to multiply fragments give the same bits, for numbers of every size.
extern "C" int cuemu_mma_paths_agree() {
  u64 random = 1;
  for (int round = 0; round < 100; round++) {
    u32 a[32][4], b[32][2];
    float d[3][32][4] = {};
    for (int i = 0; i < 32 * 6; i++) {
      random = random * 0x5851F42D4C957F2Dull + 0x14057B7EF767814Full;
      // Neither infinities nor NaN, whose bits a CPU may choose.
      u32 pair = random >> 32 & 0xBBFFBBFF;
      if (i < 128) a[i / 4][i % 4] = pair;
      else b[(i - 128) / 2][i % 2] = pair;
    }
    for (int path = 0; path < 3; path++) {
      Slot slots[32];
      for (int lane = 0; lane < 32; lane++) slots[lane] = {a[lane], b[lane], d[path][lane], 0};
      if (path == 0 && has_avx512()) multiply_avx512(slots);
      else if (path <= 1 && has_avx2()) multiply_avx2(slots);
      else multiply_plain(slots);
    }
    if (memcmp(d[0], d[2], sizeof d[0]) || memcmp(d[1], d[2], sizeof d[0])) return 0;
  }
  return 1;
}
