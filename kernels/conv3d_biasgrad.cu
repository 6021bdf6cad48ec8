// Bias gradients: db[c] += sum of dy over samples and voxels.
//
// dy is (voxels, channels); a block takes every gridDim.x-th stretch of rows x channels values, `rows` a power of two,
// so that a thread's vectors have the same channels in every stretch. Sums of a stretch's places are added in a tree
// over the rows; the blocks' results are added by wgrad_reduce. Bound: memory, 2 bytes a value.
#include "ptx.cuh"

struct BiasGrad {  // src/ops/conv3d/cuda_biasgrad.rs
  In<elem> dy;
  Out<float> partials;  // [blocks][channels]
  u64 len;
  u32 channels, rows;   // rows: at least 8
};
static_assert(sizeof(BiasGrad) == 32, "keep in step with src/ops/conv3d/cuda_biasgrad.rs");

KERNEL(bias_grad, BiasGrad, 256) {
  constexpr u32 VECTOR = 16 / sizeof(elem);
  struct alignas(16) Vector {
    elem e[VECTOR];
  };
  SHARED(memory);
  float* sums = (float*)memory;  // [rows][channels]
  u32 stretch = args.rows * args.channels;
  for (u32 place = threadIdx.x * VECTOR; place < stretch; place += blockDim.x * VECTOR) {
    float sum[VECTOR] = {};
    u64 i = (u64)blockIdx.x * stretch + place, by = (u64)gridDim.x * stretch;
#pragma unroll 4
    for (; i + VECTOR <= args.len; i += by) {
      Vector v = args.dy.vector<Vector>(i);
#pragma unroll
      for (u32 k = 0; k < VECTOR; k++) sum[k] += to_f32(v.e[k]);
    }
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) {
      if (i + k < args.len) sum[k] += to_f32(args.dy[i + k]);
      sums[place + k] = sum[k];
    }
  }
  __syncthreads();
  for (u32 half = args.rows / 2; half > 0; half /= 2) {
    for (u32 i = threadIdx.x; i < half * args.channels; i += blockDim.x) sums[i] += sums[i + half * args.channels];
    __syncthreads();
  }
  for (u32 c = threadIdx.x; c < args.channels; c += blockDim.x)
    args.partials.set((u64)blockIdx.x * args.channels + c, sums[c]);
}
