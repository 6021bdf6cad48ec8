// CUDA on a CPU: what the other half of kernels/ptx.cuh is on a GPU, for a C++ compiler. One fiber a CUDA thread;
// machine.hpp says which file runs them and which watches memory.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define DEVICE static inline
#define DEVICE_MEMBER static inline
#define DEVICE_METHOD inline

namespace cuemu {

struct Dim {
  unsigned x, y, z;
};
struct Block {
  Dim index, dim, grid;
};
// What a CUDA thread can ask about itself.
struct Thread {
  Dim index;
  const Block* block;
  unsigned linear, lane, warp;
};
extern constinit thread_local Thread* self;

// A line of a kernel, for reports.
struct Site {
  const char* file;
  int line;
};
// The caller's line as a default argument, and how a function with such arguments reads it.
#define CUEMU_SITE const char* file = __builtin_FILE(), int line = __builtin_LINE()
#define CUEMU_HERE cuemu::Site{file, line}

// Ends the launch with a report that names kernel, line (if there is one), block and thread. Returns only on the side of
// the scheduler.
void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
constexpr Site NOWHERE{nullptr, 0};

void barrier(Site site);
void warp_barrier(unsigned mask, Site site);
void shuffle(unsigned mask, const void* value, unsigned bytes, unsigned source, void* result, Site site);
void ldmatrix(uint32_t* r, int matrices, bool trans, const void* row, Site site);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site);
void copy_async(void* to, const void* from, bool valid, Site site);
void copy_commit();
void copy_wait(unsigned groups);

uint8_t* shared_memory();
// Before an access of 1, 2, 4, 8 or 16 bytes to device memory.
template <unsigned BYTES>
void on_load(const void* p, Site site);
template <unsigned BYTES>
void on_store(const void* p, Site site);
uint32_t fetch_add(uint32_t* p, uint32_t v, Site site);
uint32_t fetch_inc(uint32_t* p, uint32_t limit, Site site);
uint32_t fetch_or(uint32_t* p, uint32_t v, Site site);
void fence();

// Entry points announce themselves when the program starts.
typedef void (*Entry)(const void* args);
struct Kernel {
  const char* name;
  Entry entry;
  unsigned args_bytes, max_threads;
  Kernel* next;
  Kernel(const char* name, Entry entry, unsigned args_bytes, unsigned max_threads);
};

template <class T>
T shuffled(unsigned mask, T value, unsigned source, Site site) {
  T result;
  shuffle(mask, &value, sizeof value, source, &result, site);
  return result;
}
}  // namespace cuemu

#define CUEMU_TEXT_(x) #x
#define CUEMU_TEXT(x) CUEMU_TEXT_(x)
#define KERNEL(name, Args, threads)                                                                             \
  static void CAT(name, SUFFIX)(const Args& args);                                                              \
  static cuemu::Kernel CAT(CAT(name, SUFFIX), _entry)(                                                          \
      CUEMU_TEXT(CAT(name, SUFFIX)), [](const void* args) { CAT(name, SUFFIX)(*(const Args*)args); }, sizeof(Args), \
      threads);                                                                                                 \
  static void CAT(name, SUFFIX)(const Args& args)
#define KERNEL_RESIDENT(name, Args, threads, blocks) KERNEL(name, Args, threads)
#define SHARED(name) u8* name = cuemu::shared_memory()

#define threadIdx (cuemu::self->index)
#define blockIdx (cuemu::self->block->index)
#define blockDim (cuemu::self->block->dim)
#define gridDim (cuemu::self->block->grid)

static inline void __syncthreads(CUEMU_SITE) { cuemu::barrier(CUEMU_HERE); }
static inline void __syncwarp(unsigned mask = ~0u, CUEMU_SITE) { cuemu::warp_barrier(mask, CUEMU_HERE); }
// A source outside the lane's group of `width` is the lane itself, as on a GPU.
template <class T>
static inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, CUEMU_SITE) {
  int lane = cuemu::self->lane;
  return cuemu::shuffled(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), CUEMU_HERE);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, CUEMU_SITE) {
  int lane = cuemu::self->lane, source = lane ^ bits;
  return cuemu::shuffled(mask, v, (source & ~(width - 1)) <= (lane & ~(width - 1)) ? source : lane, CUEMU_HERE);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T v, int by, int width = 32, CUEMU_SITE) {
  int lane = cuemu::self->lane, source = lane + by;
  return cuemu::shuffled(mask, v, source < (lane & ~(width - 1)) + width ? source : lane, CUEMU_HERE);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T v, int by, int width = 32, CUEMU_SITE) {
  int lane = cuemu::self->lane, source = lane - by;
  return cuemu::shuffled(mask, v, source >= (lane & ~(width - 1)) ? source : lane, CUEMU_HERE);
}

// The nearest fp16, ties to even.
static inline h16 to_h16(float v) {
  u32 bits;
  memcpy(&bits, &v, 4);
  u32 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return h16{(u16)0x7FFF};
  if (magnitude >= 0x477FF000) return h16{(u16)(sign | 0x7C00)};
  if (magnitude < 0x38800000) {
    // Below 2^-14: adding 0.5, whose last bit is 2^-24, rounds to a multiple of fp16's smallest number.
    float half;
    memcpy(&half, &magnitude, 4);
    half += 0.5f;
    memcpy(&magnitude, &half, 4);
    return h16{(u16)(sign | (magnitude - 0x3F000000))};
  }
  magnitude += 0xFFF + (magnitude >> 13 & 1);
  return h16{(u16)(sign | ((magnitude - 0x38000000) >> 13))};
}
static inline u32 to_h16x2(float low, float high) { return to_h16(low).bits | (u32)to_h16(high).bits << 16; }
static inline float to_f32(h16 v) {
  u32 bits = (v.bits & 0x7FFFu) << 13, sign = (v.bits & 0x8000u) << 16;
  float scaled;
  memcpy(&scaled, &bits, 4);
  scaled *= 0x1p112f;
  memcpy(&bits, &scaled, 4);
  bits |= sign | ((v.bits & 0x7C00) == 0x7C00 ? 0x7F800000 : 0);
  memcpy(&scaled, &bits, 4);
  return scaled;
}

// An index is a number that remembers where it became one: `x[i]` reports the line of the kernel, not of In<T>.
namespace cuemu {
struct Index {
  u64 i;
  Site site;
  Index(u64 i, CUEMU_SITE) : i(i), site(CUEMU_HERE) {}
};
template <class T>
struct Place {
  T* p;
  Site site;
};
template <class T>
Place<T> operator+(T* p, Index i) {
  return {(T*)((uintptr_t)p + i.i * sizeof(T)), i.site};  // a kernel may go past the end: that is to be reported
}
}  // namespace cuemu
using cuemu::Index;
namespace cuemu {
// A struct moves in pieces of the largest power of two that divides its size, 16 bytes at most.
template <class V>
constexpr unsigned PIECE = sizeof(V) % 16 ? sizeof(V) & -sizeof(V) : 16;
}  // namespace cuemu
template <class V, class T>
static inline V global_load(cuemu::Place<T> from) {
  constexpr unsigned step = cuemu::PIECE<V>;
  for (unsigned at = 0; at < sizeof(V); at += step) cuemu::on_load<step>((const u8*)from.p + at, from.site);
  return *(const V*)from.p;
}
template <class V, class T>
static inline void global_store(cuemu::Place<T> to, V v) {
  constexpr unsigned step = cuemu::PIECE<V>;
  for (unsigned at = 0; at < sizeof(V); at += step) cuemu::on_store<step>((u8*)to.p + at, to.site);
  *(V*)to.p = v;
}
static inline u32 global_fetch_add(u32* p, u32 v, CUEMU_SITE) { return cuemu::fetch_add(p, v, CUEMU_HERE); }
static inline u32 global_fetch_inc(u32* p, u32 limit, CUEMU_SITE) { return cuemu::fetch_inc(p, limit, CUEMU_HERE); }
static inline u32 global_fetch_or(u32* p, u32 v, CUEMU_SITE) { return cuemu::fetch_or(p, v, CUEMU_HERE); }
static inline void global_fence() { cuemu::fence(); }

static inline void ldmatrix_x4(u32 (&r)[4], const void* row, CUEMU_SITE) {
  cuemu::ldmatrix(r, 4, false, row, CUEMU_HERE);
}
static inline void ldmatrix_x4_trans(u32 (&r)[4], const void* row, CUEMU_SITE) {
  cuemu::ldmatrix(r, 4, true, row, CUEMU_HERE);
}
static inline void ldmatrix_x2(u32 (&r)[2], const void* row, CUEMU_SITE) {
  cuemu::ldmatrix(r, 2, false, row, CUEMU_HERE);
}
static inline void ldmatrix_x2_trans(u32 (&r)[2], const void* row, CUEMU_SITE) {
  cuemu::ldmatrix(r, 2, true, row, CUEMU_HERE);
}
static inline void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, CUEMU_SITE) {
  u32 b[2] = {b0, b1};
  cuemu::mma_m16n8k16(d, a, b, CUEMU_HERE);
}
template <class T>
static inline void global_to_shared_16(void* to, cuemu::Place<T> from, bool valid) {
  cuemu::copy_async(to, from.p, valid, from.site);
}
static inline void cp_async_commit() { cuemu::copy_commit(); }
template <int N>
static inline void cp_async_wait() {
  cuemu::copy_wait(N);
}

static inline float reciprocal(float x) { return 1.0f / x; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
// The build forbids contraction, so plain operations are rounded once each.
static inline double mul_rn(double a, double b) { return a * b; }
static inline double add_rn(double a, double b) { return a + b; }
static inline float mul_rn(float a, float b) { return a * b; }
static inline float add_rn(float a, float b) { return a + b; }
template <class T>
static inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
static inline T max(T a, T b) {
  return a < b ? b : a;
}
