// Backward pass of norm and PReLU. Over the voxels of a group (all samples, or each sample), per channel:
//
//   z = scale x + shift,  dz = dy (z > 0 ? 1 : slope),  xhat = (x - mean) rstd
//   dbeta += sum dz,  dgamma += sum dz xhat,  dslope += sum of dy z over z <= 0 (one value a layer)
//   dx = scale (dz - mean(dz) - xhat mean(dz xhat)) = scale (dz - level - (x - mean) pull)
//   level = sum dz / count,  pull = rstd^2 sum dz (x - mean) / count;   both 0 where statistics are constants
//
// x, dy, dx [N, D, H, W, C] elem; gradients carry the loss scale; sums f32 a thread and block, double over blocks. Two
// launches, because dx needs the sums:
//   norm_prelu_sums  leaves partial sums of each block; the last block to arrive merges them in block order.
//   norm_prelu_dx    has the same blocks, each in opposite order: what it read last is still in L2.
// A row is C elements, or one vector where that holds several voxels; a lane is a vector of a row (one element in the
// `_scalar` kernels: odd channel counts). A thread has one lane of every (blockDim / lanes)-th row, so its channels' map
// stays in registers. blockIdx = (rows, lanes, group).
//
// Bound: memory, 5 elements a value (x and dy twice, dx once): [8, 48, 48, 48, 16] fp16 is 142 MB, 51 us at 2.8 TB/s, less
// what L2 keeps (estimates). Rejected: xhat from z (gamma may be 0); sum dz x - mean sum dz (cancels where |mean| >> std);
// a third launch that merges (2.5 us a layer against about 2 us of a last block).
#include "pending.cuh"
#include "vector.cuh"

struct NormLayer {  // src/ops/norm_prelu/cuda.rs
  In<elem> x, dy;
  Pending map;
  In<float> mean;  // (groups, C)
  u32 channels;
  u32 row;    // elements
  u32 lanes;  // of a row that a block has
  u32 rows;   // a group
  u32 rows_per_block;
  u32 unused;
};
static_assert(sizeof(NormLayer) == 24 + sizeof(Pending) + 24, "keep in step with src/ops/norm_prelu/cuda.rs");

struct NormSums {  // src/ops/norm_prelu/cuda.rs
  NormLayer layer;
  In<float> rstd;                      // (groups, C)
  InOut<float> partials;               // (groups, blocks, 2, C): sum dz, sum dz (x - mean)
  InOut<float> slopes;                 // (blocks of the grid, lanes): sums of dy z over z <= 0
  InOut<double> totals;                // (groups, 2, C)
  Out<float> means;                    // (groups, 2, C): level, pull
  InOut<float> dgamma, dbeta, dslope;  // null: not wanted
  InOut<u32> ticket;
  double weight;  // of a voxel in a mean: 1 / count, or 0 where statistics are constants
};
static_assert(sizeof(NormSums) == sizeof(NormLayer) + 80, "keep in step with src/ops/norm_prelu/cuda.rs");

struct NormDx {  // src/ops/norm_prelu/cuda.rs
  NormLayer layer;
  In<float> means;
  Out<elem> dx;
};
static_assert(sizeof(NormDx) == sizeof(NormLayer) + 16, "keep in step with src/ops/norm_prelu/cuda.rs");

// What a thread has: the values of its lane, row by row.
template <int N>
struct Lane {
  float scale[N], shift[N], mean[N], slope;
  u32 count;          // rows
  u32 start, stride;  // element of its first row; elements from row to row

  DEVICE_METHOD explicit Lane(const NormLayer& layer) {
    u32 lane = blockIdx.y * layer.lanes + threadIdx.x % layer.lanes, step = blockDim.x / layer.lanes;
    u32 end = min((blockIdx.x + 1) * layer.rows_per_block, layer.rows);
    u32 first = blockIdx.x * layer.rows_per_block + threadIdx.x / layer.lanes;
    bool any = first < end && lane * N < layer.row;
    count = any ? (end - first + step - 1) / step : 0;
    start = (blockIdx.z * layer.rows + first) * layer.row + lane * N;
    stride = step * layer.row;
    if (!any) return;
    for (int j = 0; j < N; j++) {
      u32 c = channel(layer, j);
      scale[j] = layer.map.scale[c];
      shift[j] = layer.map.shift[c];
      mean[j] = layer.mean[c];
    }
    slope = layer.map.slope ? layer.map.slope[0] : 1.0f;
  }
  // Where value j is in a (groups, C) table.
  DEVICE_METHOD u32 channel(const NormLayer& layer, int j) const {
    return blockIdx.z * layer.channels + (start + j) % layer.channels;
  }
};

// Sums over the rows of a block, for each lane: row 0 has the result. values[N][blockDim] is shared memory, free before, and
// again after the caller's next barrier. Threads of row >= rows only keep company at barriers.
template <int N, class T>
DEVICE void sum_rows(T* values, T (&sum)[N], u32 row, u32 rows, u32 lanes) {
  for (u32 n = rows, half; n > 1; n = half) {
    half = (n + 1) / 2;
    if (row >= half && row < n)
      for (int j = 0; j < N; j++) values[j * blockDim.x + threadIdx.x] = sum[j];
    __syncthreads();
    if (row + half < n)
      for (int j = 0; j < N; j++) sum[j] += values[j * blockDim.x + threadIdx.x + half * lanes];
  }
}

// In the last block: from partial sums to totals, to parameter gradients and what dx needs.
DEVICE void finish(const NormSums& args, double* values) {
  u32 channels = args.layer.channels, blocks = gridDim.x, groups = gridDim.z, table = 2 * channels;
  u32 width = min(groups * table, blockDim.x), parts = blockDim.x / width, part = threadIdx.x / width;
  for (u32 base = 0; base < groups * table; base += width) {
    u32 column = base + threadIdx.x % width;
    bool any = part < parts && column < groups * table;
    double sum[1] = {0.0};
    if (any) {
      u32 at = column / table * blocks * table + column % table;
#pragma unroll 8
      for (u32 b = part; b < blocks; b += parts) sum[0] += args.partials[at + b * table];
    }
    sum_rows(values, sum, part, parts, width);
    if (any && part == 0) args.totals.set(column, sum[0]);
  }
  __syncthreads();
  for (u32 c = threadIdx.x; c < channels; c += blockDim.x) {
    double dbeta = 0.0, dgamma = 0.0;
    for (u32 g = 0; g < groups; g++) {
      u32 at = g * table + c;
      double rstd = args.rstd[g * channels + c];
      double dz = args.totals[at], dz_xhat = args.totals[at + channels] * rstd;
      dbeta += dz;
      dgamma += dz_xhat;
      args.means.set(at, (float)(dz * args.weight));
      args.means.set(at + channels, (float)(dz_xhat * rstd * args.weight));
    }
    if (args.dbeta) args.dbeta.set(c, (float)(args.dbeta[c] + dbeta));
    if (args.dgamma) args.dgamma.set(c, (float)(args.dgamma[c] + dgamma));
  }
  if (!args.dslope) return;
  double sum[1] = {0.0};
  u32 slopes = gridDim.x * gridDim.y * gridDim.z * args.layer.lanes;
#pragma unroll 8
  for (u32 i = threadIdx.x; i < slopes; i += blockDim.x) sum[0] += args.slopes[i];
  sum_rows(values, sum, threadIdx.x, blockDim.x, 1);
  if (threadIdx.x == 0) args.dslope.set(0, (float)(args.dslope[0] + sum[0]));
}

template <int N>
DEVICE void norm_prelu_sums(const NormSums& args) {
  SHARED(shared);
  u32* flag = (u32*)shared;
  float* values = (float*)(shared + 16);  // (2 N + 1, blockDim)
  const NormLayer& layer = args.layer;
  Lane<N> lane(layer);
  float sum[2 * N + 1] = {};  // dz; dz (x - mean); dy z over z <= 0
  constexpr int UNROLL = N == 8 ? 1 : 4;  // 64 registers: two blocks of 512 a multiprocessor, 32 KB on their way
#pragma unroll(UNROLL)
  for (u32 left = lane.count, at = lane.start; left > 0; left--, at += lane.stride) {
    float x[N], dy[N];
    load(layer.x, at, x);
    load(layer.dy, at, dy);
    for (int j = 0; j < N; j++) {
      float z = lane.scale[j] * x[j] + lane.shift[j];
      float dz = z > 0.0f ? dy[j] : lane.slope * dy[j];
      sum[j] += dz;
      sum[N + j] += dz * (x[j] - lane.mean[j]);
      sum[2 * N] += z > 0.0f ? 0.0f : dy[j] * z;
    }
  }
  u32 row = threadIdx.x / layer.lanes;
  sum_rows(values, sum, row, blockDim.x / layer.lanes, layer.lanes);
  if (row == 0)
    for (int j = 0; j < 2 * N + 1; j++) values[j * blockDim.x + threadIdx.x] = sum[j];
  __syncthreads();
  // Where a row is several voxels, a channel has several values in it.
  u32 first = blockIdx.y * layer.lanes * N, width = min(layer.channels - first, layer.lanes * N);
  u32 block = blockIdx.z * gridDim.x + blockIdx.x;
  for (u32 t = threadIdx.x; t < 2 * width; t += blockDim.x) {
    u32 which = t / width, c = t % width;
    float total = 0.0f;
    for (u32 e = c; e < layer.lanes * N; e += layer.channels)
      total += values[(which * N + e % N) * blockDim.x + e / N];
    args.partials.set((block * 2 + which) * layer.channels + first + c, total);
  }
  if (row == 0)
    args.slopes.set((block * gridDim.y + blockIdx.y) * layer.lanes + threadIdx.x, sum[2 * N]);
  if (last_block(args.ticket, gridDim.x * gridDim.y * gridDim.z, flag)) finish(args, (double*)values);
}

template <int N>
DEVICE void norm_prelu_dx(const NormDx& args) {
  const NormLayer& layer = args.layer;
  Lane<N> lane(layer);
  if (lane.count == 0) return;
  float level[N], pull[N];
  for (int j = 0; j < N; j++) {
    u32 at = lane.channel(layer, j) + blockIdx.z * layer.channels;
    level[j] = args.means[at];
    pull[j] = args.means[at + layer.channels];
  }
#pragma unroll 2
  for (u32 left = lane.count, at = lane.start + (left - 1) * lane.stride; left > 0; left--, at -= lane.stride) {
    float x[N], dy[N];
    load(layer.x, at, x);
    load(layer.dy, at, dy);
    for (int j = 0; j < N; j++) {
      float z = lane.scale[j] * x[j] + lane.shift[j];
      float dz = z > 0.0f ? dy[j] : lane.slope * dy[j];
      x[j] = lane.scale[j] * (dz - level[j] - (x[j] - lane.mean[j]) * pull[j]);
    }
    store(args.dx, at, x);
  }
}

KERNEL(norm_prelu_sums, NormSums, 512) { norm_prelu_sums<VECTOR>(args); }
KERNEL(norm_prelu_sums_scalar, NormSums, 512) { norm_prelu_sums<1>(args); }
KERNEL(norm_prelu_dx, NormDx, 512) { norm_prelu_dx<VECTOR>(args); }
KERNEL(norm_prelu_dx_scalar, NormDx, 512) { norm_prelu_dx<1>(args); }
