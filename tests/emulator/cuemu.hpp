// CUDA on a CPU: what kernels/ptx.cuh is on a GPU, for a C++ compiler. One fiber a CUDA thread; see runtime.cpp.
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

// What a CUDA thread can ask about itself.
struct Thread {
  Dim thread, block, block_dim, grid_dim;
  unsigned linear, lane, warp;
};
extern thread_local Thread* self;

// Where a fiber waits: for reports of deadlock and divergence.
struct Site {
  const char* file;
  int line;
};
#define CUEMU_SITE cuemu::Site site = cuemu::Site{__builtin_FILE(), __builtin_LINE()}

// Ends the launch with a report that names block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void barrier(Site site);

// A warp collective: every lane of `mask` deposits `bytes`, the last one to arrive runs `together` once over all slots.
// Returns this exchange's slots: `slot` bytes apart, lane by lane.
constexpr unsigned SLOT = 128;
struct Exchange {
  const uint8_t* in;
  const uint8_t* out;
};
typedef void (*Together)(const uint8_t* in, uint8_t* out, unsigned mask);
Exchange collective(unsigned mask, int kind, const void* deposit, unsigned bytes, Together together, Site site);

uint8_t* shared_memory();
void on_load(const void* p, unsigned bytes, Site site);
void on_store(const void* p, unsigned bytes, Site site);
uint32_t fetch_add(uint32_t* p, uint32_t v);
uint32_t fetch_inc(uint32_t* p, uint32_t limit);
uint32_t fetch_or(uint32_t* p, uint32_t v);
void fence();
void copy_async(void* to, const void* from, bool valid, Site site);
void copy_commit();
void copy_wait(int groups);
void ldmatrix(uint32_t* r, int matrices, bool trans, const void* row, Site site);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site);
float to_f32(uint16_t bits);
uint16_t to_f16(float v);

// Entry points announce themselves when the program starts.
typedef void (*Entry)(const void* args);
struct Kernel {
  const char* name;
  Entry entry;
  unsigned args_bytes, max_threads;
  Kernel* next;
  Kernel(const char* name, Entry entry, unsigned args_bytes, unsigned max_threads);
};
}  // namespace cuemu

#define CUEMU_TEXT_(x) #x
#define CUEMU_TEXT(x) CUEMU_TEXT_(x)
#define KERNEL(name, Args, threads)                                                                             \
  static void CAT(name, SUFFIX)(const Args& args);                                                              \
  static cuemu::Kernel CAT(CAT(name, SUFFIX), _entry)(                                                          \
      CUEMU_TEXT(CAT(name, SUFFIX)), [](const void* args) { CAT(name, SUFFIX)(*(const Args*)args); }, sizeof(Args), \
      threads);                                                                                                 \
  static void CAT(name, SUFFIX)(const Args& args)
#define SHARED(name) u8* name = cuemu::shared_memory()

#define threadIdx (cuemu::self->thread)
#define blockIdx (cuemu::self->block)
#define blockDim (cuemu::self->block_dim)
#define gridDim (cuemu::self->grid_dim)

static inline void __syncthreads(CUEMU_SITE) { cuemu::barrier(site); }
static inline void __syncwarp(unsigned mask = ~0u, CUEMU_SITE) {
  cuemu::collective(mask, 1, nullptr, 0, nullptr, site);
}

namespace cuemu {
template <class T>
T lane_value(unsigned mask, T v, int source, Site site) {
  Exchange x = collective(mask, 2, &v, sizeof v, nullptr, site);
  if (!(mask >> source & 1)) fail("shuffle from lane %d, which takes no part (%s:%d)", source, site.file, site.line);
  T r;
  memcpy(&r, x.in + SLOT * source, sizeof r);
  return r;
}
}  // namespace cuemu
template <class T>
static inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, CUEMU_SITE) {
  int lane = cuemu::self->lane;
  return cuemu::lane_value(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), site);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, CUEMU_SITE) {
  int lane = cuemu::self->lane, source = lane ^ bits;
  return cuemu::lane_value(mask, v, (source & ~(width - 1)) <= (lane & ~(width - 1)) ? source : lane, site);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T v, int by, int width = 32, CUEMU_SITE) {
  int lane = cuemu::self->lane, source = lane + by;
  return cuemu::lane_value(mask, v, source < (lane & ~(width - 1)) + width ? source : lane, site);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T v, int by, int width = 32, CUEMU_SITE) {
  int lane = cuemu::self->lane, source = lane - by;
  return cuemu::lane_value(mask, v, source >= (lane & ~(width - 1)) ? source : lane, site);
}

static inline h16 to_h16(float v) { return h16{cuemu::to_f16(v)}; }
static inline float to_f32(h16 v) { return cuemu::to_f32(v.bits); }
template <class T>
static inline T global_load(const T* p, CUEMU_SITE) {
  cuemu::on_load(p, sizeof(T), site);
  return *p;
}
template <class T>
static inline void global_store(T* p, T v, CUEMU_SITE) {
  cuemu::on_store(p, sizeof(T), site);
  *p = v;
}
static inline u32 global_fetch_add(u32* p, u32 v) { return cuemu::fetch_add(p, v); }
static inline u32 global_fetch_inc(u32* p, u32 limit) { return cuemu::fetch_inc(p, limit); }
static inline u32 global_fetch_or(u32* p, u32 v) { return cuemu::fetch_or(p, v); }
static inline void global_fence() { cuemu::fence(); }
static inline void ldmatrix_x4(u32 (&r)[4], const void* row, CUEMU_SITE) { cuemu::ldmatrix(r, 4, false, row, site); }
static inline void ldmatrix_x4_trans(u32 (&r)[4], const void* row, CUEMU_SITE) {
  cuemu::ldmatrix(r, 4, true, row, site);
}
static inline void ldmatrix_x2(u32 (&r)[2], const void* row, CUEMU_SITE) { cuemu::ldmatrix(r, 2, false, row, site); }
static inline void ldmatrix_x2_trans(u32 (&r)[2], const void* row, CUEMU_SITE) {
  cuemu::ldmatrix(r, 2, true, row, site);
}
static inline void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, CUEMU_SITE) {
  u32 b[2] = {b0, b1};
  cuemu::mma_m16n8k16(d, a, b, site);
}
static inline void global_to_shared_16(void* to, const void* from, bool valid, CUEMU_SITE) {
  cuemu::copy_async(to, from, valid, site);
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
