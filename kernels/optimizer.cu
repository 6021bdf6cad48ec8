// One optimizer step over all parameters, with the gradient scaler of mixed precision; no host in the loop.
//
// Values w, gradients g and first moments m are flat f32 buffers of one layout: tensors one after another, each from a
// multiple of 4 floats on, gaps zero. A chunk is a run of one tensor; one block works on one chunk. Two launches:
//   optimizer_check    reads all of g: is every value a number? Novograd: n = |g / scale|^2 a tensor. The last block
//                      decides whether the step is taken, counts it, moves the loss scale and, of a step that is
//                      taken, Novograd's second moments.
//   optimizer_adam     g <- g / scale + decay w;  m <- m + (1 - b1) (g - m);  v <- b2 v + (1 - b2) g^2;
//                      w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps);  g <- 0 for the next step.
//   optimizer_novograd v <- v == 0 ? n : b2 v + (1 - b2) n (one a tensor, done in optimizer_check);
//                      m <- b1 m + (g / scale / (sqrt(v) + eps) + decay w);  w <- w - lr m;  g <- 0.
// And before weights are kept, optimizer_finite: is every value of w, m and v a number? One launch a buffer.
// t counts the steps that were taken. Where a value of g is inf or NaN, w, m and v stay as they are, bit for bit, and
// the scale of a scaled loss falls (torch.amp.GradScaler, `_amp_update_scale_`; torch without a scaler would go on).
// Every operation is in the order of src/train/optimizer.rs and rounded on its own, so Adam's bits are the CPU's;
// Novograd's differ by the order in which squares are summed (double, chunk by chunk).
//
// Bound: memory. Adam moves 8 floats a parameter and reads g once more for the check: 4.8 M parameters, 154 MB + 19 MB
// = 0.062 ms at 2.8 TB/s of an H100; the check leaves g in L2 (19 of 50 MB). Novograd: 6 floats, 0.048 ms.
// Rejected: one launch (a grid-wide wait for the check); inf tests in every weight gradient (more kernels to be right
// about, and 19 MB read from L2 are 4 us); norms summed by the update's own blocks (each would read its tensor's sums,
// but then v changes while others read it).
#include "ptx.cuh"

constexpr u32 THREADS = 256;  // src/ops/optimizer/cuda.rs
constexpr u32 WARPS = THREADS / 32;

struct alignas(16) Float4 {
  float v[4];
};

struct Chunk {  // src/ops/optimizer/mod.rs
  u32 start, len;  // floats of the flat buffers, multiples of 4
  u32 tensor;
};
static_assert(sizeof(Chunk) == 12, "keep in step with src/ops/optimizer/mod.rs");

struct alignas(16) Counts {  // src/ops/optimizer/cuda.rs
  u32 growth;    // steps taken since the scale last changed
  u32 steps;     // steps taken
  u32 skipped;   // steps not taken
  u32 infinite;  // whether the last step's gradients had an inf or NaN
};
static_assert(sizeof(Counts) == 16, "keep in step with src/ops/optimizer/cuda.rs");

// What the check decided for the update.
struct alignas(16) Step {  // src/ops/optimizer/cuda.rs
  u32 skip;
  float unscale;    // 1 / scale
  float step_size;  // Adam: lr / (1 - b1^t). Novograd: lr
  float root;       // Adam: sqrt(1 - b2^t)
};
static_assert(sizeof(Step) == 16, "keep in step with src/ops/optimizer/cuda.rs");

struct Check {  // src/ops/optimizer/cuda.rs
  In<Chunk> chunks;
  In<u32> first_chunk;  // tensors + 1: where each tensor's chunks begin
  In<float> grads;
  InOut<double> squares;  // Novograd: sum of squares of each chunk
  InOut<float> second;    // Novograd: second moment of each tensor; null: Adam
  InOut<float> scale;     // one: what the loss was multiplied with
  InOut<Counts> counts;   // one
  Out<Step> step;         // one
  InOut<u32> infinite;    // one, 0 between launches
  InOut<u32> ticket;      // one, 0 between launches
  double lr, beta1, beta2;
  float growth, backoff;
  u32 interval;  // steps between two growths of the scale; 0: the loss is not scaled
  u32 tensors;
};
static_assert(sizeof(Check) == 10 * 8 + 3 * 8 + 4 * 4, "keep in step with src/ops/optimizer/cuda.rs");

struct Update {  // src/ops/optimizer/cuda.rs
  In<Chunk> chunks;
  In<Step> step;
  InOut<float> values, grads, first;
  InOut<float> second;  // Adam: one a value. Novograd: one a tensor
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay;
};
static_assert(sizeof(Update) == 6 * 8 + 6 * 4, "keep in step with src/ops/optimizer/cuda.rs");

struct Finite {  // src/ops/optimizer/cuda.rs
  In<float> values;
  InOut<u32> infinite;  // one
  u64 len;
};
static_assert(sizeof(Finite) == 3 * 8, "keep in step with src/ops/optimizer/cuda.rs");

// b^n by squaring, in the order of Rust's powi.
DEVICE double power(double b, u32 n) {
  double result = 1.0;
  for (;;) {
    if (n & 1) result = mul_rn(result, b);
    n >>= 1;
    if (n == 0) return result;
    b = mul_rn(b, b);
  }
}

DEVICE double warp_sum(double v) {
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// inf - inf and NaN - NaN are NaN.
DEVICE bool is_number(float v) { return v - v == 0.0f; }

// Exact for a power of two, which `reciprocal` does not promise.
DEVICE float unscaling(float scale) { return (float)(1.0 / (double)scale); }

// By one thread, when all gradients have been looked at. Whether the step is skipped.
DEVICE u32 decide(const Check& args) {
  u32 infinite = args.infinite[0];
  args.infinite.set(0, 0);
  bool scaled = args.interval != 0;
  float scale = args.scale[0];
  Counts counts = args.counts[0];
  counts.infinite = infinite;
  if (infinite) {
    counts.skipped++;
    counts.growth = 0;
    if (scaled) args.scale.set(0, scale * args.backoff);
  } else {
    counts.steps++;
    if (scaled && ++counts.growth == args.interval) {
      counts.growth = 0;
      float grown = scale * args.growth;
      if (is_number(grown)) args.scale.set(0, grown);
    }
  }
  args.counts.set(0, counts);
  Step step{infinite, unscaling(scale), (float)args.lr, 1.0f};
  if (!args.second && !infinite) {
    step.step_size = (float)(args.lr / (1.0 - power(args.beta1, counts.steps)));
    step.root = (float)sqrt(1.0 - power(args.beta2, counts.steps));
  }
  args.step.set(0, step);
  return infinite;
}

// One warp a tensor; its chunks are added in one order whatever the schedule.
DEVICE void second_moment(const Check& args, u32 tensor) {
  u32 lane = threadIdx.x % 32, end = args.first_chunk[tensor + 1];
  double sum = 0.0;
  for (u32 i = args.first_chunk[tensor] + lane; i < end; i += 32) sum += args.squares[i];
  sum = warp_sum(sum);
  if (lane == 0) {
    float v = args.second[tensor];
    double mean = add_rn(mul_rn((double)v, args.beta2), mul_rn(1.0 - args.beta2, sum));
    args.second.set(tensor, (float)(v == 0.0f ? sum : mean));
  }
}

KERNEL(optimizer_check, Check, THREADS) {
  SHARED(shared);
  double* warp_sums = (double*)shared;
  u32* word = (u32*)(warp_sums + WARPS);
  Chunk chunk = args.chunks[blockIdx.x];
  float unscale = unscaling(args.scale[0]);
  double sum = 0.0;
  bool numbers = true;
  for (u32 i = 4 * threadIdx.x; i < chunk.len; i += 4 * THREADS) {
    Float4 g = args.grads.vector<Float4>(chunk.start + i);
    for (u32 e = 0; e < 4; e++) {
      numbers = numbers && is_number(g.v[e]);
      // The square of a float is exact in double.
      double u = mul_rn(g.v[e], unscale);
      sum += u * u;
    }
  }
  if (!numbers) global_fetch_or(args.infinite.p, 1);
  if (args.second) {
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (u32 w = 1; w < WARPS; w++) sum += warp_sums[w];
      args.squares.set(blockIdx.x, sum);
    }
  }
  if (!last_block(args.ticket, gridDim.x, word)) return;
  __syncthreads();
  if (threadIdx.x == 0) *word = decide(args);
  __syncthreads();
  if (!args.second || *word) return;
  for (u32 tensor = threadIdx.x / 32; tensor < args.tensors; tensor += WARPS) second_moment(args, tensor);
}

struct Adam {
  const Update& args;
  const Step& step;
  DEVICE_METHOD void operator()(float& w, float g, float& m, float& v) const {
    g = add_rn(mul_rn(g, step.unscale), mul_rn(args.decay, w));
    m = add_rn(m, mul_rn(args.one_minus_beta1, g - m));
    v = add_rn(mul_rn(args.beta2, v), mul_rn(mul_rn(args.one_minus_beta2, g), g));
    w = w - mul_rn(step.step_size, m) / (sqrtf(v) / step.root + args.eps);
  }
};

KERNEL(optimizer_adam, Update, THREADS) {
  Chunk chunk = args.chunks[blockIdx.x];
  Step step = args.step[0];
  for (u32 i = 4 * threadIdx.x; i < chunk.len; i += 4 * THREADS) {
    u64 at = chunk.start + i;
    if (!step.skip) {
      Float4 w = args.values.vector<Float4>(at), g = args.grads.vector<Float4>(at);
      Float4 m = args.first.vector<Float4>(at), v = args.second.vector<Float4>(at);
      for (u32 e = 0; e < 4; e++) Adam{args, step}(w.v[e], g.v[e], m.v[e], v.v[e]);
      args.values.vector(at, w);
      args.first.vector(at, m);
      args.second.vector(at, v);
    }
    args.grads.vector(at, Float4{});
  }
}

KERNEL(optimizer_novograd, Update, THREADS) {
  Chunk chunk = args.chunks[blockIdx.x];
  Step step = args.step[0];
  float denominator = sqrtf(args.second[chunk.tensor]) + args.eps;
  for (u32 i = 4 * threadIdx.x; i < chunk.len; i += 4 * THREADS) {
    u64 at = chunk.start + i;
    if (!step.skip) {
      Float4 w = args.values.vector<Float4>(at), g = args.grads.vector<Float4>(at);
      Float4 m = args.first.vector<Float4>(at);
      for (u32 e = 0; e < 4; e++) {
        float direction = mul_rn(g.v[e], step.unscale) / denominator;
        m.v[e] = add_rn(mul_rn(args.beta1, m.v[e]), add_rn(direction, mul_rn(args.decay, w.v[e])));
        w.v[e] = w.v[e] - mul_rn(step.step_size, m.v[e]);
      }
      args.values.vector(at, w);
      args.first.vector(at, m);
    }
    args.grads.vector(at, Float4{});
  }
}

// Bound: memory, 12 bytes a parameter with Adam. Rejected: a look by the host, which copies as much over the bus.
KERNEL(optimizer_finite, Finite, THREADS) {
  u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
  if (i < args.len && !is_number(args.values[i])) global_fetch_or(args.infinite.p, 1);
}
