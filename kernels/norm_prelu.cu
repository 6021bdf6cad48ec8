// Batch or instance norm, forward: from the convolution's per-tile statistics to the map that consumers apply while they
// load (pending.cuh), and the running statistics. The normalised values themselves are never written.
//
//   mean, M2   of a group (all samples, or each sample) and channel, from per-tile (count, mean, M2)
//   rstd  = 1 / sqrt(M2 / count + 1e-5)
//   scale = gamma rstd,  shift = beta - mean scale;   then z = scale x + shift, y = PReLU(z)
//   running = 0.9 running + 0.1 (mean + bias, unbiased variance)
//
// Tiles (groups, tiles, C, 3); everything else (groups, C). A block has `slice` channels of a group (blockIdx.y) and
// blockDim / slice rows; row r takes tiles r, r + rows, ..; then rows merge pairwise. Both by Chan's rule in f32: a tile's
// mean is f32 already, and M2 is a sum of terms >= 0. rstd, scale and shift in double, once a channel.
//
// Bound: latency. The largest inputs, 8 patches of 48^3 x 16 or 96^3 x 2 in tiles of 8^3, are 332 KB: 1728 or 13824 tiles
// a channel, so 7 or 27 merges a thread and 8 or 9 levels of the tree, some 3 to 5 us with the launch (an estimate).
// Rejected: M2 from sums and sums of squares (cancels where |mean| >> std); double throughout (a division a merge: about
// 10 us on sm_90, 300 us on sm_86).
#include "ptx.cuh"

constexpr double EPS = 1e-5, MOMENTUM = 0.1;

struct Norm {  // src/ops/norm_prelu/cuda.rs
  In<float> gamma, beta;  // (C); null: 1 and 0
  Out<float> mean, var, rstd, scale, shift;
  Out<u32> ticket;  // counts the blocks of the backward pass: zeroed here
  u32 channels, unused;
};

DEVICE void normalise(const Norm& norm, u32 g, u32 c, double mean, double var) {
  u32 i = g * norm.channels + c;
  double rstd = 1.0 / sqrt(var + EPS), scale = norm.gamma ? rstd * norm.gamma[c] : rstd;
  double shift = (norm.beta ? (double)norm.beta[c] : 0.0) - mean * scale;
  norm.mean.set(i, (float)mean);
  norm.var.set(i, (float)var);
  norm.rstd.set(i, (float)rstd);
  norm.scale.set(i, (float)scale);
  norm.shift.set(i, (float)shift);
  if (i == 0) norm.ticket.set(0, 0);
}

struct Moments {
  float count, mean, m2;
};

// Chan, Golub, LeVeque 1983.
DEVICE void merge(Moments& a, const Moments& b) {
  if (b.count == 0.0f) return;
  float count = a.count + b.count, share = b.count / count, delta = b.mean - a.mean;
  a.mean += delta * share;
  a.m2 += b.m2 + delta * delta * share * a.count;
  a.count = count;
}

struct NormMerge {  // src/ops/norm_prelu/cuda.rs
  In<float> tiles;
  Norm norm;
  double count;      // voxels a group
  u32 tile_count;    // a group
  u32 slice;         // channels a block
};
static_assert(sizeof(NormMerge) == 8 + sizeof(Norm) + 16, "keep in step with src/ops/norm_prelu/cuda.rs");

KERNEL(norm_prelu_merge, NormMerge, 512) {
  SHARED(shared);
  Moments* kept = (Moments*)shared;  // (rows, slice)
  u32 rows = blockDim.x / args.slice, row = threadIdx.x / args.slice, g = blockIdx.y;
  u32 c = blockIdx.x * args.slice + threadIdx.x % args.slice;
  Moments m{0.0f, 0.0f, 0.0f};
  if (c < args.norm.channels) {
#pragma unroll 4
    for (u32 tile = row; tile < args.tile_count; tile += rows) {
      u32 at = ((g * args.tile_count + tile) * args.norm.channels + c) * 3;
      merge(m, Moments{args.tiles[at], args.tiles[at + 1], args.tiles[at + 2]});
    }
  }
  for (u32 n = rows, half; n > 1; n = half) {
    half = (n + 1) / 2;
    if (row >= half && row < n) kept[threadIdx.x] = m;
    __syncthreads();
    if (row + half < n) merge(m, kept[threadIdx.x + half * args.slice]);
  }
  if (row == 0 && c < args.norm.channels) normalise(args.norm, g, c, m.mean, m.m2 / args.count);
}

struct NormConstant {  // src/ops/norm_prelu/cuda.rs
  In<float> mean, var;  // (C); null: 0 and 1 - eps, so that only gamma, beta and PReLU are left
  In<float> bias;       // (C), part of `mean` but not of x; null: 0
  Norm norm;
};
static_assert(sizeof(NormConstant) == 24 + sizeof(Norm), "keep in step with src/ops/norm_prelu/cuda.rs");

KERNEL(norm_prelu_constant, NormConstant, 256) {
  u32 c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= args.norm.channels) return;
  double mean = args.mean ? args.mean[c] : 0.0, var = args.var ? args.var[c] : 1.0 - EPS;
  normalise(args.norm, 0, c, args.bias ? mean - args.bias[c] : mean, var);
}

struct NormRunning {  // src/ops/norm_prelu/cuda.rs
  In<float> batch_mean, batch_var, bias;
  InOut<float> mean, var;
  double unbiased;  // count / (count - 1)
  u32 channels, unused;
};
static_assert(sizeof(NormRunning) == 56, "keep in step with src/ops/norm_prelu/cuda.rs");

KERNEL(norm_prelu_running, NormRunning, 256) {
  u32 c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= args.channels) return;
  double mean = (double)args.batch_mean[c] + args.bias[c], var = args.batch_var[c] * args.unbiased;
  // A batch that overflowed, whose step the gradient scaler voids, must not be remembered either.
  if (!(mean - mean == 0.0 && var - var == 0.0)) return;
  args.mean.set(c, (float)(args.mean[c] * (1.0 - MOMENTUM) + mean * MOMENTUM));
  args.var.set(c, (float)(args.var[c] * (1.0 - MOMENTUM) + var * MOMENTUM));
}

struct NormTiles {  // src/ops/norm_prelu/cuda.rs
  In<elem> x;
  Out<float> tiles;
  u32 voxels, channels;  // of a sample
  u32 tile, tile_count;  // voxels a tile, tiles a sample
};
static_assert(sizeof(NormTiles) == 32, "keep in step with src/ops/norm_prelu/cuda.rs");

// (count, mean, M2) of every tile for an x that no convolution left them of. A thread has a channel of a tile: its two
// passes hit L1.
KERNEL_RESIDENT(norm_prelu_tiles, NormTiles, 128, 8) {
  u32 first = blockIdx.x * args.tile, end = min(first + args.tile, args.voxels);
  u64 sample = (u64)blockIdx.y * args.voxels;
  for (u32 c = threadIdx.x; c < args.channels; c += blockDim.x) {
    float sum = 0.0f, m2 = 0.0f;
    for (u32 v = first; v < end; v++) sum += to_f32(args.x[(sample + v) * args.channels + c]);
    float count = (float)(end - first), mean = sum / count;
    for (u32 v = first; v < end; v++) {
      float d = to_f32(args.x[(sample + v) * args.channels + c]) - mean;
      m2 += d * d;
    }
    u64 at = (((u64)blockIdx.y * args.tile_count + blockIdx.x) * args.channels + c) * 3;
    args.tiles.set(at, count);
    args.tiles.set(at + 1, mean);
    args.tiles.set(at + 2, m2);
  }
}
