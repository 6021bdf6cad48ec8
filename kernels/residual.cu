// y = a + b, either of them with a pending norm and PReLU; dy goes to both. Gradients that arrive from two consumers are
// added by it too.
//
// x -> scale x + shift = z -> z > 0 ? z : slope z, per channel, or per (sample, channel) where `per_sample` is set.
// NDHWC. One thread a vector of 16 bytes (8 fp16, 4 float) of one sample (blockIdx.y), or one element where a sample is
// not whole vectors. Scale and shift are read per element: a warp asks for at most 32 neighbouring floats at a time,
// which L1 has.
//
// Bound: memory. 3 elements moved for a sum (2 without b): a skip of [8, 48, 48, 48, 16] fp16 is 85 MB, 30 us at
// 2.8 TB/s (an estimate). Rejected: fixed channels a thread with the map in registers, as in norm_prelu_backward.cu: 64
// registers of maps for a kernel whose L1 reads fill a third of its memory time.
#include "pending.cuh"
#include "vector.cuh"

struct Residual {  // src/ops/residual/cuda.rs
  In<elem> a, b;   // b null: y = a
  Out<elem> y;
  Pending map_a, map_b;
  u32 channels, sample_len;  // sample_len: elements of one sample
};
static_assert(sizeof(Residual) == 24 + 2 * sizeof(Pending) + 8, "keep in step with src/ops/residual/cuda.rs");

template <int N>
DEVICE void residual_sum(const Residual& args) {
  u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * N, n = blockIdx.y;
  if (i >= args.sample_len) return;
  u64 at = (u64)n * args.sample_len + i;
  float a[N], b[N] = {};
  load(args.a, at, a);
  if (args.b) load(args.b, at, b);
  u32 c = i % args.channels;
#pragma unroll
  for (int j = 0; j < N; j++) {
    a[j] = apply(args.map_a, a[j], n, c, args.channels) + apply(args.map_b, b[j], n, c, args.channels);
    c = c + 1 == args.channels ? 0 : c + 1;
  }
  store(args.y, at, a);
}

KERNEL(residual_add, Residual, 256) { residual_sum<VECTOR>(args); }
KERNEL(residual_add_scalar, Residual, 256) { residual_sum<1>(args); }
