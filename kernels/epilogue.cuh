// What happens to a warp's sums: bias, rounding to storage, statistics for the norm that follows, full-width stores.
//
// Statistics are taken of the values as stored, per block of the grid and channel: (count, mean, M2), M2 about the mean of
// the very same values, never E[x^2] - E[x]^2. Lanes, then warps, are merged in a fixed order (Chan et al.), so they do not
// depend on the schedule.
#pragma once
#include "tile.cuh"

// One of up to two outputs that share their input.
struct Head {       // src/ops/conv3d/args.rs
  Out<elem> y;      // (N, D, H, W, channels)
  In<float> bias;   // (channels), or null
  Out<float> stats;  // (N, tiles, channels, 3), or null
  u32 channels, groups;
};

// A group of 16 output channels: which head it belongs to and its first channel there.
struct Group {
  const Head& head;
  u32 channel;
};
DEVICE Group group_of(const Head (&heads)[2], u32 group) {
  bool second = group >= heads[0].groups;
  return Group{second ? heads[1] : heads[0], (second ? group - heads[0].groups : group) * GROUP};
}

DEVICE float stored(float v) { return to_f32(to_elem(v)); }

// Sum over the lanes that hold the same channels.
DEVICE float sum_over_rows(float v) {
  for (int offset = 4; offset < 32; offset <<= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

struct Moments {
  float count, mean, m2;
};
DEVICE Moments merge(const Moments& a, const Moments& b) {
  float count = a.count + b.count;
  if (count == 0.0f) return a;
  float delta = b.mean - a.mean, share = b.count / count;
  return Moments{count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// Moments of `value(i)`, i < COUNT where bit i of `valid` is set, over the lanes that `sum` adds up.
template <int COUNT, class Value, class Sum>
DEVICE Moments moments_of(u32 valid, Value value, Sum sum) {
  static_assert(COUNT <= 32, "one bit each");
  float count = 0.0f, total = 0.0f, m2 = 0.0f;
#pragma unroll
  for (u32 i = 0; i < COUNT; i++) {
    count += valid >> i & 1 ? 1.0f : 0.0f;
    total += valid >> i & 1 ? value(i) : 0.0f;
  }
  count = sum(count);
  float mean = sum(total) / max(count, 1.0f);
#pragma unroll
  for (u32 i = 0; i < COUNT; i++) {
    float delta = valid >> i & 1 ? value(i) - mean : 0.0f;
    m2 += delta * delta;
  }
  return Moments{count, mean, sum(m2)};
}

// Adds the bias and rounds.
DEVICE void finish(Block& block, const Group& group) {
  for (u32 j = 0; j < 2; j++)
    for (u32 e = 0; e < 2; e++) {
      u32 channel = group.channel + 8 * j + 2 * (lane_id() & 3) + e;
      float bias = group.head.bias && channel < group.head.channels ? group.head.bias[channel] : 0.0f;
      block.c[j][e] = stored(block.c[j][e] + bias);
      block.c[j][e + 2] = stored(block.c[j][e + 2] + bias);
    }
}

// Four lanes with four words each, transposed: lane t gets the t-th word of each, in the order of the lanes.
DEVICE void transpose_quad(u32 (&r)[4]) {
  u32 t = lane_id() & 3;
#pragma unroll
  for (u32 bit = 1; bit <= 2; bit <<= 1)
#pragma unroll
    for (u32 k = 0; k < 2; k++) {
      u32 a = bit == 1 ? 2 * k : k, b = a + bit;
      u32 got = __shfl_xor_sync(0xffffffffu, t & bit ? r[a] : r[b], bit);
      if (t & bit) r[a] = got;
      else r[b] = got;
    }
}

// Stores a block whose rows g and g + 8 are the voxels `low` and `high` of a sample that starts at `y`.
DEVICE void store(const Block& block, const Group& group, Out<elem> y, u32 low, u32 high) {
  u32 channels = group.head.channels, t = lane_id() & 3;
#if ELEM == 16
  if (channels % VECTOR == 0) {
    // The four lanes of a row hold four pieces each of two vectors in two rows: transposed, each has one whole vector.
    u32 r[4];
    for (u32 i = 0; i < 4; i++) r[i] = to_h16x2(block.c[i & 1][i & 2], block.c[i & 1][(i & 2) + 1]);
    transpose_quad(r);
    u32 voxel = t & 2 ? high : low, c = group.channel + (t & 1) * VECTOR;
    if (voxel != NO_VOXEL && c < channels) y.vector(voxel * channels + c, Word4{{r[0], r[1], r[2], r[3]}});
    return;
  }
#endif
  for (u32 row = 0; row < 2; row++) {
    u32 voxel = row ? high : low;
    if (voxel == NO_VOXEL) continue;
    for (u32 j = 0; j < 2; j++)
      for (u32 e = 0; e < 2; e++) {
        u32 c = group.channel + 8 * j + 2 * t + e;
        if (c < channels) y.set(voxel * channels + c, to_elem(block.c[j][2 * row + e]));
      }
  }
}

// Moments of the 16 channels of M blocks of a warp, written to `to` by the lanes of row 0. Bit 2 m + half of `valid` says
// that row g + 8 half of block m is a voxel.
template <int M>
DEVICE void moments(const Block (&blocks)[M], u32 valid, Moments* to) {
#pragma unroll
  for (u32 j = 0; j < 2; j++)
#pragma unroll
    for (u32 e = 0; e < 2; e++) {
      Moments own =
          moments_of<M * 2>(valid, [&](u32 i) { return blocks[i >> 1].c[j][2 * (i & 1) + e]; }, sum_over_rows);
      if (lane_id() < 4) to[8 * j + 2 * lane_id() + e] = own;
    }
}

// Where a block of the grid stands and how its warps are arranged.
struct Position {
  u32 n, tile, tiles;        // sample, tile of the sample, tiles of a sample
  u32 warp_m, warps_m;       // among the warps that hold other voxels of the same channels
  u32 warp_n, warps_n;       // among those that hold other channels
  u32 first_group;           // of the block
  bool active;               // whether this warp has results
};

// Moments of the warps of a block, [warp_n][g][warp_m][16 channels] in `all`, merged and stored; by all its threads.
template <int G>
DEVICE void store_moments(const Moments* all, const Head (&heads)[2], u32 groups, const Position& at) {
  __syncthreads();
  for (u32 i = threadIdx.x; i < at.warps_n * G * GROUP; i += blockDim.x) {
    u32 index = at.first_group + i / GROUP;
    if (index >= groups) continue;
    Group group = group_of(heads, index);
    u32 channel = group.channel + i % GROUP;
    if (!group.head.stats || channel >= group.head.channels) continue;
    const Moments* own = all + i / GROUP * at.warps_m * GROUP + i % GROUP;
    Moments sum = own[0];
    for (u32 w = 1; w < at.warps_m; w++) sum = merge(sum, own[w * GROUP]);
    u64 to = (((u64)at.n * at.tiles + at.tile) * group.head.channels + channel) * 3;
    group.head.stats.set(to, sum.count);
    group.head.stats.set(to + 1, sum.mean);
    group.head.stats.set(to + 2, sum.m2);
  }
}

// Finishes a block of the grid; called by all its threads. `acc[g][m]` are a warp's sums of its g-th group;
// `voxel(m, half)` is the voxel of the sample that row g + 8 half of block m is, or NO_VOXEL. `scratch` is shared memory
// for warps_m x warps_n x G x 16 Moments that nobody else uses any more.
template <int G, int M, class Voxel>
DEVICE void epilogue(Block (&acc)[G][M], const Head (&heads)[2], u32 groups, u32 voxels, const Position& at, Voxel voxel,
                     u8* scratch) {
  Moments* all = (Moments*)scratch;
#pragma unroll
  for (u32 g = 0; g < G; g++) {
    u32 index = at.first_group + at.warp_n * G + g;
    if (!at.active || index >= groups) continue;
    Group group = group_of(heads, index);
    Out<elem> y = group.head.y.at((u64)at.n * voxels * group.head.channels);
    u32 valid = 0;
#pragma unroll
    for (u32 m = 0; m < M; m++) {
      u32 low = voxel(m, 0), high = voxel(m, 1);
      valid |= (low != NO_VOXEL) << 2 * m | (high != NO_VOXEL) << (2 * m + 1);
      finish(acc[g][m], group);
      store(acc[g][m], group, y, low, high);
    }
    if (group.head.stats) moments(acc[g], valid, all + ((at.warp_n * G + g) * at.warps_m + at.warp_m) * GROUP);
  }
  if (heads[0].stats || heads[1].stats) store_moments<G>(all, heads, groups, at);
}
