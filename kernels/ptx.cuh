// The only file that knows PTX, and the only way to global memory. Kernels include nothing else of the toolkit: NVRTC
// gets this file in memory. Where a C++ compiler reads it instead, tests/emulator/cuemu.hpp runs the same functions.
//
// A module is compiled once for each storage precision: ELEM is 16 (`elem` is fp16) or 32 (`elem` is float). Every
// sum is float or wider; `elem` is storage only. Symbols end in _f16 or _f32, so profilers show which one ran.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef short i16;
typedef int i32;
typedef long long i64;

// IEEE binary16, storage only.
struct h16 {
  u16 bits;
};

#if ELEM == 16
typedef h16 elem;
#define SUFFIX _f16
#elif ELEM == 32
typedef float elem;
#define SUFFIX _f32
#else
#error "ELEM is 16 or 32: the bits of a stored activation"
#endif

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)

#if defined(__CUDACC_RTC__)

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__
// An entry point: one struct of arguments by value, at most `threads` threads a block. Reads them as `args`.
#define KERNEL(name, Args, threads) \
  extern "C" __global__ void __launch_bounds__(threads) CAT(name, SUFFIX)(const __grid_constant__ Args args)
// The same where the compiler may not spend more registers than let `blocks` blocks run on a multiprocessor, and need not
// spend fewer: left alone it spills for the sake of one more block.
#define KERNEL_RESIDENT(name, Args, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) CAT(name, SUFFIX)(const __grid_constant__ Args args)
// The block's dynamic shared memory, the only shared memory there is.
#define SHARED(name) extern __shared__ __align__(1024) u8 name[]

DEVICE h16 to_h16(float v) {
  h16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
  return h;
}
DEVICE float to_f32(h16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}

// Of an element in global memory. The emulator's also knows the line it was made on, for reports.
typedef u64 Index;
// A V from the address of a T, or to it.
template <class V, class T>
DEVICE V global_load(const T* p) {
  return *(const V*)p;
}
// Two floats rounded to fp16, `low` in the low half.
DEVICE u32 to_h16x2(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class V, class T>
DEVICE void global_store(T* p, V v) {
  *(V*)p = v;
}
// Adds and returns the old value.
DEVICE u32 global_fetch_add(u32* p, u32 v) { return atomicAdd(p, v); }
// Counts 0, 1, .. limit, 0, ..; returns the old value.
DEVICE u32 global_fetch_inc(u32* p, u32 limit) { return atomicInc(p, limit); }
// Or; returns the old value.
DEVICE u32 global_fetch_or(u32* p, u32 v) { return atomicOr(p, v); }
// What this thread wrote before is seen by whoever sees what it writes after.
DEVICE void global_fence() { __threadfence(); }

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix transposed.
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two matrices; lanes 0..15 give addresses.
DEVICE void ldmatrix_x2(u32 (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
// d[16x8] += a[16x16] b[16x8], fp16 in, float sums. Lane l = 4 g + t holds d rows g and g + 8, columns 2 t and 2 t + 1:
// d[0], d[1] in row g, d[2], d[3] in row g + 8.
DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Copies 16 bytes to shared memory behind the back of the thread, or writes zeros there if not `valid`.
DEVICE void global_to_shared_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are under way.
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// 1 / x to one unit in the last place, for x of normal size.
DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// Rounded once each, never contracted: where a CPU's exact order of operations is to be followed.
DEVICE double mul_rn(double a, double b) { return __dmul_rn(a, b); }
DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }

#else
#include "cuemu.hpp"
#endif

DEVICE float to_f32(float v) { return v; }
template <class E>
struct Rounded;
template <>
struct Rounded<h16> {
  DEVICE_MEMBER h16 of(float v) { return to_h16(v); }
};
template <>
struct Rounded<float> {
  DEVICE_MEMBER float of(float v) { return v; }
};
DEVICE elem to_elem(float v) { return Rounded<elem>::of(v); }

// 4, 8 and 16 bytes that move in one instruction.
struct alignas(4) Word1 {
  u32 w[1];
};
struct alignas(8) Word2 {
  u32 w[2];
};
struct alignas(16) Word4 {
  u32 w[4];
};

// Global memory that nobody writes during the launch.
template <class T>
struct In {
  const T* p;
  DEVICE_METHOD T operator[](Index i) const { return global_load<T>(p + i); }
  // One vector from element i on; its address must be a multiple of its size.
  template <class V>
  DEVICE_METHOD V vector(Index i) const {
    return global_load<V>(p + i);
  }
  DEVICE_METHOD In<T> at(u64 i) const { return In<T>{p + i}; }
  DEVICE_METHOD explicit operator bool() const { return p != nullptr; }
};

// Global memory that this launch only writes.
template <class T>
struct Out {
  T* p;
  DEVICE_METHOD void set(Index i, T v) const { global_store(p + i, v); }
  template <class V>
  DEVICE_METHOD void vector(Index i, V v) const {
    global_store(p + i, v);
  }
  DEVICE_METHOD Out<T> at(u64 i) const { return Out<T>{p + i}; }
  DEVICE_METHOD explicit operator bool() const { return p != nullptr; }
};

// Global memory that this launch reads and writes.
template <class T>
struct InOut {
  T* p;
  DEVICE_METHOD T operator[](Index i) const { return global_load<T>(p + i); }
  DEVICE_METHOD void set(Index i, T v) const { global_store(p + i, v); }
  template <class V>
  DEVICE_METHOD V vector(Index i) const {
    return global_load<V>(p + i);
  }
  template <class V>
  DEVICE_METHOD void vector(Index i, V v) const {
    global_store(p + i, v);
  }
  DEVICE_METHOD InOut<T> at(u64 i) const { return InOut<T>{p + i}; }
  DEVICE_METHOD explicit operator bool() const { return p != nullptr; }
};

template <class T>
DEVICE void cp_async_16(void* to, In<T> from, Index i, bool valid) {
  global_to_shared_16(to, from.p + (valid ? i : Index(0)), valid);
}

// Whether this is the last block to arrive: it then sees what all others wrote before. `counter` is 0 between launches.
// To be called by all threads of the block; `flag` is a word of shared memory.
DEVICE bool last_block(InOut<u32> counter, u32 blocks, u32* flag) {
  global_fence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    *flag = global_fetch_inc(counter.p, blocks - 1) == blocks - 1;
    global_fence();
  }
  __syncthreads();
  return *flag != 0;
}

DEVICE float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
