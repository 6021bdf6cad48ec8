// Kernels with a bug each, to prove that the emulator finds it: `bug` 0 is the correct kernel, which must pass with every
// schedule. tests/emulator.rs says what each must be reported as. Compiled for that test only.
#include "ptx.cuh"

struct Planted {  // tests/emulator.rs
  In<float> x;
  InOut<float> y;
  InOut<u8> bytes;
  InOut<u32> counter;
  u32 n, bug;
};
static_assert(sizeof(Planted) == 40, "keep in step with tests/emulator.rs");

// y[i] = n x[i].
KERNEL(planted_scale, Planted, 256) {
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  args.y.set(i, args.n * args.x[i]);
}

// The neighbour's value by way of shared memory, without the barrier.
KERNEL(planted_sync, Planted, 256) {
  SHARED(memory);
  float* s = (float*)memory;
  u32 t = threadIdx.x;
  s[t] = args.x[t];
  if (!args.bug) __syncthreads();
  args.y.set(t, s[(t + 1) % blockDim.x]);
}

// The same 4 times through two buffers; with one buffer, a fast thread overwrites what a slow one has not read yet.
KERNEL(planted_double_buffer, Planted, 256) {
  SHARED(memory);
  float* s = (float*)memory;
  u32 t = threadIdx.x;
  float v = args.x[t];
  for (u32 k = 0; k < 4; k++) {
    float* buffer = s + (args.bug ? 0 : k % 2 * blockDim.x);
    buffer[t] = v;
    __syncthreads();
    v = buffer[(t + 1) % blockDim.x];
  }
  args.y.set(t, v);
}

// One element past the end, on either side.
KERNEL(planted_past_end, Planted, 256) {
  u32 t = threadIdx.x;
  args.y.set(t, args.x[t + (args.bug ? 1 : 0)]);
}
KERNEL(planted_halo, Planted, 256) {
  u32 t = threadIdx.x;
  float left = t > 0 || args.bug ? args.x[(i64)t - 1] : 0.0f;
  args.y.set(t, args.x[t] + left);
}
KERNEL(planted_past_store, Planted, 256) {
  u32 t = threadIdx.x;
  args.y.set(t + (args.bug ? 65 : 0), args.x[t]);
}

// `n` floats of shared memory and one more.
KERNEL(planted_short_shared, Planted, 256) {
  SHARED(memory);
  float* s = (float*)memory;
  u32 t = threadIdx.x;
  s[t] = args.x[t];
  if (args.bug && t == 0) s[args.n] = 1.0f;
  __syncthreads();
  args.y.set(t, s[t]);
}

// A local array that is too short.
KERNEL(planted_local, Planted, 256) {
  u32 t = threadIdx.x;
  float local[4] = {args.x[t], 0.0f, 0.0f, 0.0f};
  u32 i = args.bug ? args.n / 32 : 3;
  float* p = local;
  p[i] = 1.0f;
  args.y.set(t, p[t % 4] + p[i]);
}

// cp.async of 4 floats a thread: `bug` 1 waits for all groups but the last, 2 does not wait.
KERNEL(planted_copy_wait, Planted, 64) {
  SHARED(memory);
  float* s = (float*)memory;
  u32 t = threadIdx.x;
  cp_async_16(s + 4 * t, args.x, 4 * t, true);
  cp_async_commit();
  if (args.bug == 0) cp_async_wait<0>();
  if (args.bug == 1) cp_async_wait<1>();
  __syncthreads();
  float v = s[(4 * t + 5) % (4 * blockDim.x)];
  if (args.bug == 1) cp_async_wait<0>();
  args.y.set(t, v);
}

// A barrier that only the first warp reaches; with `bug` 2 the others wait at another one.
KERNEL(planted_barrier, Planted, 256) {
  SHARED(memory);
  float* s = (float*)memory;
  u32 t = threadIdx.x;
  s[t] = args.x[t];
  if (!args.bug || t < 32) __syncthreads();
  else if (args.bug == 2)
    __syncthreads();
  args.y.set(t, s[t]);
}

// A shuffle of all lanes that half of them do not run, and one at another line.
KERNEL(planted_warp, Planted, 256) {
  u32 t = threadIdx.x;
  float v = args.x[t];
  if (!args.bug || t % 32 < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  else if (args.bug == 2)
    v = __shfl_xor_sync(0xffffffffu, v, 2);
  args.y.set(t, v);
}

// A shuffle of the first 16 lanes from a lane that takes no part.
KERNEL(planted_lane, Planted, 256) {
  u32 t = threadIdx.x;
  float v = args.x[t];
  if (t % 32 < 16) v = __shfl_sync(0x0000ffffu, v, args.bug ? 20 : 5);
  args.y.set(t, v);
}

// Each block writes bytes of its own; with the bug, its first one is also the last of the block before.
KERNEL(planted_two_writers, Planted, 256) {
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  args.bytes.set(args.bug && threadIdx.x == 0 && i ? i - 1 : i, (u8)i);
  args.y.set(i, args.x[i]);
}

// What the next block writes, read or not.
KERNEL(planted_cross_read, Planted, 256) {
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  args.y.set(i, args.x[i]);
  if (args.bug) args.bytes.set(i, (u8)args.y[(i + blockDim.x) % (gridDim.x * blockDim.x)]);
}

// Written by one block after all have read it.
KERNEL(planted_late_write, Planted, 256) {
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  InOut<float> shared_value = args.y.at(gridDim.x * blockDim.x);
  args.y.set(i, args.x[i] + 0.0f * shared_value[0]);
  if (args.bug && i == 0) shared_value.set(0, 1.0f);
}

// y[0] = sum x by the last block. `bug` 1 has no fence before the atomic, 2 none after it, 3 none and no atomic.
KERNEL(planted_last_block, Planted, 256) {
  SHARED(memory);
  float* s = (float*)memory;
  u32* flag = (u32*)(s + 8);
  u32 t = threadIdx.x, b = blockIdx.x;
  float sum = warp_sum(args.x[b * blockDim.x + t]);
  if (t % 32 == 0) s[t / 32] = sum;
  __syncthreads();
  if (t == 0) {
    for (u32 w = 1; w < blockDim.x / 32; w++) sum += s[w];
    args.y.set(1 + b, sum);
  }
  bool last;
  if (args.bug == 0) {
    last = last_block(args.counter, gridDim.x, flag);
  } else if (args.bug == 3) {
    last = b == gridDim.x - 1;
  } else {
    if (args.bug == 2) global_fence();
    __syncthreads();
    if (t == 0) {
      *flag = global_fetch_inc(args.counter.p, gridDim.x - 1) == gridDim.x - 1;
      if (args.bug == 1) global_fence();
    }
    __syncthreads();
    last = *flag;
  }
  if (last && t == 0) {
    sum = 0.0f;
    for (u32 i = 0; i < gridDim.x; i++) sum += args.y[1 + i];
    args.y.set(0, sum);
  }
}

// Two levels: the last block of each pair sums the pair, the last pair sums all. y[0] = sum over blocks of x[block].
KERNEL(planted_two_levels, Planted, 32) {
  SHARED(memory);
  u32 b = blockIdx.x, t = threadIdx.x, pair = b / 2, pairs = gridDim.x / 2;
  u32* flag = (u32*)memory;
  InOut<float> of_block = args.y.at(1), of_pair = args.y.at(1 + gridDim.x);
  if (t == 0) of_block.set(b, args.x[b]);
  if (!last_block(InOut<u32>{args.counter.p + 1 + pair}, 2, flag)) return;
  if (t == 0) of_pair.set(pair, of_block[2 * pair] + of_block[2 * pair + 1]);
  __syncthreads();
  if (!last_block(args.counter, pairs, flag)) return;
  if (t != 0) return;
  float sum = 0.0f;
  for (u32 i = 0; i < pairs; i++) sum += of_pair[i];
  if (args.bug) sum += 0.0f * of_block[gridDim.x - 1 - b];
  args.y.set(0, sum);
}

// 16 bytes from an address that is a multiple of 4 only.
KERNEL(planted_misaligned, Planted, 64) {
  u32 t = threadIdx.x;
  Word4 v = args.x.vector<Word4>(4 * t + (args.bug && t + 1 < blockDim.x));
  args.y.vector(4 * t, v);
}

// Waits until all blocks have arrived.
KERNEL(planted_spin, Planted, 32) {
  if (threadIdx.x == 0) {
    global_fetch_add(args.counter.p, 1);
    while (args.bug && global_fetch_add(args.counter.p, 0) < gridDim.x) {
    }
  }
  args.y.set(blockIdx.x * blockDim.x + threadIdx.x, args.x[blockIdx.x * blockDim.x + threadIdx.x]);
}

// Waits in shared memory for a value that nobody writes.
KERNEL(planted_forever, Planted, 64) {
  SHARED(memory);
  volatile u32* flag = (volatile u32*)memory;
  if (threadIdx.x == 0) *flag = 1;
  __syncthreads();
  while (args.bug && *flag == 1) {
  }
}

// Shared memory that nobody has written.
KERNEL(planted_uninitialised, Planted, 256) {
  SHARED(memory);
  float* s = (float*)memory;
  u32 t = threadIdx.x;
  if (!args.bug) s[t] = args.x[t];
  args.y.set(t, s[t]);
}

// y[block] = how many blocks ran before.
KERNEL(planted_order, Planted, 32) {
  if (threadIdx.x == 0) args.y.set(blockIdx.x, (float)global_fetch_add(args.counter.p, 1));
}

// y[4 lane + i] = the bits of what ldmatrix gives: x is 32 rows of 4 words, `n` bytes apart in shared memory; `bug` picks
// x4, x4.trans, x2, x2.trans.
KERNEL(planted_ldmatrix, Planted, 32) {
  SHARED(memory);
  u32 lane = threadIdx.x;
  for (u32 i = 0; i < 4; i++) ((float*)(memory + lane * args.n))[i] = args.x[4 * lane + i];
  __syncthreads();
  u32 r[4] = {}, two[2] = {};
  const void* row = memory + lane * args.n;
  if (args.bug == 0) ldmatrix_x4(r, row);
  if (args.bug == 1) ldmatrix_x4_trans(r, row);
  if (args.bug == 2) ldmatrix_x2(two, row);
  if (args.bug == 3) ldmatrix_x2_trans(two, row);
  if (args.bug >= 2)
    for (u32 i = 0; i < 2; i++) r[i] = two[i];
  for (u32 i = 0; i < 4; i++) args.y.set(4 * lane + i, __builtin_bit_cast(float, r[i]));
}

// x: for each lane 4 words of a, 2 of b; y: for each lane 4 numbers of d, which the product is added to.
KERNEL(planted_mma, Planted, 32) {
  u32 lane = threadIdx.x, a[4], b[2];
  float d[4];
  for (u32 i = 0; i < 4; i++) a[i] = __builtin_bit_cast(u32, args.x[6 * lane + i]);
  for (u32 i = 0; i < 2; i++) b[i] = __builtin_bit_cast(u32, args.x[6 * lane + 4 + i]);
  for (u32 i = 0; i < 4; i++) d[i] = args.y[4 * lane + i];
  mma_m16n8k16(d, a, b[0], b[1]);
  for (u32 i = 0; i < 4; i++) args.y.set(4 * lane + i, d[i]);
}
