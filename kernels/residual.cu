// y = a + b, either of them with a pending norm and PReLU; dy goes to both.
//
// x -> scale x + shift = z -> z > 0 ? z : slope z, per channel, or per (sample, channel) where `per_sample` is set.
// NDHWC; one thread a vector of 16 bytes (8 fp16, 4 float) or, where C is no multiple of that, one element.
// Bound: memory, 3 elements moved for one sum.
#include "pending.cuh"

struct Residual {  // src/ops/residual/cuda.rs
  In<elem> a, b;
  Out<elem> y;
  Pending map_a, map_b;
  u32 channels, sample_len;  // sample_len: elements of one sample
  u64 len;
};
static_assert(sizeof(Residual) == 24 + 2 * sizeof(Pending) + 16, "keep in step with src/ops/residual/cuda.rs");

KERNEL(residual_add, Residual, 256) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= args.len) return;
  u32 n = i / args.sample_len, c = i % args.channels;
  float a = apply(args.map_a, to_f32(args.a[i]), n, c, args.channels);
  float b = args.b ? apply(args.map_b, to_f32(args.b[i]), n, c, args.channels) : 0.0f;
  args.y.set(i, to_elem(a + b));
}
